"""The section on what each layer lost, beside what rounding would have lost."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from qtool.report.lengths import Axes
from qtool.report.page.drawing import by_block, logarithmic, style_of
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.page.parts import Absent, PageSection, PageTable, Part, Picture, Words
from qtool.report.page.wordings import place_of, scientific

_TITLE = "Loss of each layer"
MEASURES = (
    ("output_error", "output_error_rounded", "error of the outputs, share of their power"),
    ("nmse", "", "error of the weights, share of their power"),
)
"""Of a layer as it was solved, and rounded to nearest; the first that the report has is shown."""
WORST = 10
MOST_KINDS = 7
Placed = Mapping[int, float]


def losses_section(evidence: Evidence) -> PageSection | Absent:
    """Return losses over the blocks, by kind of layer, and the layers that lost most."""
    measured = [
        (one, [layer for layer in evidence.layers if layer.get(one[0]) is not None])
        for one in MEASURES
    ]
    (after, before, unit), layers = next((one for one in measured if one[1]), (MEASURES[0], []))
    if not layers:
        return Absent(
            _TITLE, "quantization_report.json, which has it, is missing or names no loss."
        )
    has_before = bool(before) and all(layer.get(before) is not None for layer in layers)
    parts: list[Part] = [Words(_about(has_before, unit))]
    parts += _pictures(layers, after, before if has_before else "", unit)
    parts.append(_by_kind(layers, after, before if has_before else ""))
    parts.append(_worst(layers, after, before if has_before else ""))
    return PageSection(_TITLE, tuple(parts))


def _about(has_before: bool, unit: str) -> str:  # noqa: FBT001
    if not has_before:
        return (
            f"Measured is the {unit}. With calibration data, errors of outputs would be known, "
            "and what rounding to nearest would have lost."
        )
    return (
        f"Measured is the {unit}, on samples that no layer was solved for. Before: weights rounded "
        "to nearest, with the same bits; after: as the method solved them. The error that comes "
        "in with the inputs, from the layers before, is in both."
    )


def _pictures(layers: Sequence[Facts], after: str, before: str, unit: str) -> Iterable[Picture]:
    means = {"after": _over_blocks(layers, after)}
    if before:
        means = {"before": _over_blocks(layers, before), **means}
    if len(means["after"]) > 1:
        title = "Loss over the blocks, mean of their layers"
        yield Picture(title, _trend(means), _paint(means, unit))
        kinds = _kinds(layers)
        if 1 < len(kinds) <= MOST_KINDS:
            curves = {kind: _over_blocks(of_kind, after) for kind, of_kind in kinds.items()}
            title = "Loss over the blocks, by kind of layer"
            yield Picture(title, _extremes(curves), _paint(curves, unit))


def _paint(curves: Mapping[str, Placed], unit: str) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for number, (label, points) in enumerate(curves.items()):
            axes.plot(list(points), list(points.values()), label=label, **style_of(number))
        logarithmic(axes, "y")
        by_block(axes)
        axes.set_ylabel(unit)

    return paint


def _over_blocks(layers: Iterable[Facts], measure: str) -> dict[int, float]:
    """Return the mean of each block; a loss of 0 has no place on a logarithmic axis."""
    found = defaultdict(list)
    for layer in layers:
        block, _ = place_of(layer["name"])
        if block is not None and layer[measure] > 0:
            found[block].append(layer[measure])
    return {block: fmean(values) for block, values in sorted(found.items())}


def _kinds(layers: Iterable[Facts]) -> dict[str, list[Facts]]:
    found = defaultdict(list)
    for layer in layers:
        block, kind = place_of(layer["name"])
        found[kind if block is not None else layer["name"]].append(layer)
    return found


def _trend(curves: Mapping[str, Placed]) -> str:
    """Say of each curve where it begins, ends and is highest."""
    said = []
    for label, points in curves.items():
        if points:
            (first, begin), (last, end) = [list(points.items())[at] for at in (0, -1)]
            top = max(points, key=points.__getitem__)
            said.append(
                f"{label}: {begin:.1e} in block {first}, {end:.1e} in block {last}, most in block "
                f"{top} with {points[top]:.1e}"
            )
    return "; ".join(said) + "."


def _extremes(curves: Mapping[str, Placed]) -> str:
    """Say which kinds lose most and least."""
    means = {kind: fmean(points.values()) for kind, points in curves.items() if points}
    most, least = (pick(means, key=means.__getitem__) for pick in (max, min))
    return (
        f"On average over the blocks {most} loses most, {means[most]:.1e}, and {least} least, "
        f"{means[least]:.1e}."
    )


def _by_kind(layers: Sequence[Facts], after: str, before: str) -> PageTable:
    rows: list[tuple[str, ...]] = []
    for kind, found in _kinds(layers).items():
        mean = fmean(layer[after] for layer in found)
        cells = (kind, str(len(found)))
        if before:
            rounded = fmean(layer[before] for layer in found)
            gain = f"{mean / rounded - 1:+.0%}" if rounded else ""
            rows.append((*cells, scientific(rounded), scientific(mean), gain))
        else:
            rows.append((*cells, scientific(mean)))
    columns = (
        "kind of layer",
        ">layers",
        *((">before", ">after", ">change") if before else (">loss",)),
    )
    return PageTable("Mean loss by kind of layer", columns, tuple(rows))


def _worst(layers: Sequence[Facts], after: str, before: str) -> PageTable:
    chosen = sorted(layers, key=lambda layer: -layer[after])[:WORST]
    rows = [
        (
            layer["name"],
            *((scientific(layer[before]),) if before else ()),
            scientific(layer[after]),
        )
        for layer in chosen
    ]
    columns = ("layer", *((">before", ">after") if before else (">loss",)))
    return PageTable(f"The {len(chosen)} layers that lost most", columns, tuple(rows))
