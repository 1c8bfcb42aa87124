"""What the blocks of a model are made of beside linears: it stays as it is."""

from collections import Counter
from collections.abc import Mapping
from math import prod

from qtool.errors import ModelError
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import Recipe, resolve
from qtool.wording import list_names

MOST_LEFT = 0.1
"""More of the blocks' weights than this doesn't stay unquantized unless a recipe says so."""
TO_NAME = 0.01


def beside_linears(source: ModelSource) -> Mapping[str, int]:
    """Return what else the blocks are made of: number of values by name, without `.weight`."""
    linears = {source.stored_name(f"{name}.weight") for name in source.block_linears()}
    return {
        name.removesuffix(".weight"): prod(source.spec(name).shape)
        for name in source.block_tensors()
        if source.stored_name(name) not in linears
    }


def check_rest(source: ModelSource, recipe: Recipe, rest: Mapping[str, int]) -> None:
    """Check that what stays as it is without being asked for is little: norms and biases.

    Raises:
        ModelError: it is more than a tenth.
    """
    linears = sum(prod(source.weight_shape(name)) for name in source.block_linears())
    total = linears + sum(rest.values())
    left: Counter[str] = Counter()
    for name, size in rest.items():
        if resolve(recipe.weights, name) is not None:
            left[name.removeprefix(source.adapter.blocks + ".").partition(".")[2]] += size
    if left.total() <= MOST_LEFT * total:
        return
    sizes = left.most_common()
    names = [name for name, size in sizes if size > TO_NAME * total or name == sizes[0][0]]
    raise ModelError(
        f"{left.total() / total:.0%} of the weights of the blocks would stay as they are: qtool "
        f"doesn't quantize {list_names(names)}. If that is what you want, say so for each in "
        f"weights.overrides: {{match: '*.{names[0]}', skip: true}}."
    )
