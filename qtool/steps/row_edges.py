"""Where the rows of a layer can be divided into problems of their own."""

from itertools import pairwise

from qtool.steps.plan import LayerPlan, load_method


def row_edges(layer: LayerPlan, groups: int) -> tuple[int, ...]:
    """Return where the row groups of a layer begin, and last its out_features.

    No boundary cuts a group of scales, whatever scheme is chosen. There are fewer groups where
    there are fewer such boundaries, and one where all rows share a stored number.
    """
    rows = layer.shape.out_features
    unit = max(_unit(each) for each in layer.alternatives())
    units = -(-rows // unit)
    count = min(groups, units)
    return (*(unit * (index * units // count) for index in range(count)), rows)


def _unit(layer: LayerPlan) -> int:
    """Return of how many rows at least a layer can be put together."""
    scheme, shape, layout = layer.scheme, layer.shape, load_method(layer.method).layout
    tall = shape._replace(out_features=64 * shape.out_features)
    parts, more = (layout(scheme, each, layer.options) for each in (shape, tall))
    if any(more[name].shape == part.shape for name, part in parts.items()):
        return shape.out_features  # that part is of all rows
    return scheme.group_size or 1 if scheme.group_dim == "out_features" else 1


def row_parts(layer: LayerPlan, most: int | None) -> list[slice]:
    """Return the parts of a layer's rows that are solved apart.

    It decides what comes out, so nothing but the layer and the recipe decides it.

    Args:
        layer: What to do with it.
        most: Rows of a part; None: all. Parts are larger where rows belong together.
    """
    rows = layer.shape.out_features
    edges = row_edges(layer, 1 if most is None else -(-rows // most))
    return [slice(first, last) for first, last in pairwise(edges)]
