"""What stays in 16 bit, and why: what blocks hold beside linears, and what a recipe leaves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from qtool.checkpoint.kept_kinds import OUTSIDE_BLOCKS
from qtool.errors import ModelError
from qtool.modeling.kinds_of_weights import FEWEST_DIMENSIONS, PlainWeight
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import Recipe, resolve
from qtool.steps.request import section_of
from qtool.wording import list_names

MOST_LEFT = 0.1
"""More of the blocks' weights than this doesn't stay unquantized unless a recipe says so."""
TO_NAME = 0.01
NO_NAME = "no weight that the model has by that name"


def beside_linears(source: ModelSource) -> Mapping[str, int]:
    """Return what else the blocks are made of: number of values by name, without `.weight`."""
    linears = {source.stored_name(f"{name}.weight") for name in source.block_linears()}
    return {
        name.removesuffix(".weight"): prod(source.spec(name).shape)
        for name in source.block_tensors()
        if source.stored_name(name) not in linears
    }


def check_rest(source: ModelSource, recipe: Recipe, rest: Mapping[str, int]) -> None:
    """Check that what stays as it is without being asked for, or being meant to, is little.

    Raises:
        ModelError: it is more than a tenth.
    """
    linears = sum(prod(source.weight_shape(name)) for name in source.block_linears())
    total = linears + sum(rest.values())
    left: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for name, size in rest.items():
        plain = _plain(source, name)
        if _is_vector(source, name):  # a norm's or a bias: where layers are narrow, not so little
            continue
        if resolve(recipe.weights, name) is not None and (plain is None or not plain.is_meant):
            kind = name.removeprefix(source.adapter.blocks + ".").partition(".")[2]
            left[kind] += size
            reasons[kind] = NO_NAME if plain is None else plain.why
    if left.total() <= MOST_LEFT * total:
        return
    sizes = left.most_common()
    names = [name for name, size in sizes if size > TO_NAME * total or name == sizes[0][0]]
    raise ModelError(
        f"{left.total() / total:.0%} of the weights of the blocks would stay as they are: qtool "
        f"doesn't quantize {list_names(names)}: {reasons[names[0]]}. If that is what you want, say "
        "so for each in "
        f"weights.overrides: {{match: '*.{names[0]}', skip: true}}."
    )


def unquantized(source: ModelSource, recipe: Recipe, kept: Sequence[str]) -> dict[str, str]:
    """Return why each weight of two dimensions and more stays as it is.

    Args:
        source: The original.
        recipe: What was asked for.
        kept: Full names of the tensors that are copied unchanged; `Plan.kept`.
    """
    linears, blocks = frozenset(source.block_linears()), frozenset(source.block_tensors())
    found = {}
    for name in kept:
        if len(source.spec(name).shape) >= FEWEST_DIMENSIONS:
            layer = name.removesuffix(".weight")
            if layer in linears:
                found[name] = _why_linear(source, recipe, layer)
            else:
                found[name] = _why_other(source, name, in_blocks=name in blocks)
    return found


def _is_vector(source: ModelSource, name: str) -> bool:
    full = f"{name}.weight"
    return len(source.spec(full if source.has(full) else name).shape) < FEWEST_DIMENSIONS


def _why_linear(source: ModelSource, recipe: Recipe, layer: str) -> str:
    if resolve(recipe.weights, layer) is None:
        return "weights.overrides skips it"
    is_sensitive = source.is_sensitive(layer)
    if section_of(recipe, layer, is_sensitive=is_sensitive) is None:
        return "sensitive: an override in weights.overrides that matches it quantizes it"
    return "choosing left it"


def _why_other(source: ModelSource, name: str, *, in_blocks: bool) -> str:
    for table, section in ((source.adapter.embedding, "embedding"), (source.adapter.head, "head")):
        if name == f"{table}.weight":
            return f"the recipe has no section {section!r}"
    plain = _plain(source, name)
    if not in_blocks:
        return OUTSIDE_BLOCKS + ("" if plain is None else f": {plain.why}")
    return NO_NAME if plain is None else plain.why


def _plain(source: ModelSource, name: str) -> PlainWeight | None:
    """Return what is known of a weight, with or without `.weight`, or of what it is joined to."""
    for full in (f"{name}.weight", name):
        if full in source.plain:
            return source.plain[full]
        stored = source.stored_name(full)
        for made, joined in source.joined.items():
            if made in source.plain and any(piece == stored for _, piece in joined.pieces):
                return source.plain[made]
    return None
