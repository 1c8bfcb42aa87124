"""Folds: factors between the inputs and the weights of linears that share these inputs.

One file per fold, its file's name is its name in recipes, constant FOLD. A fold is a function from
a `FoldProblem` to a `FoldSolution`; where the factors go is said by `modeling.foldable`, and
`modeling.folded` applies them.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtool import plugins
from qtool.scheme import WeightScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldProblem:
    """Linears that share their inputs, which what is before them can divide by a factor each."""

    name: str
    """Dotted name of the first linear, for messages."""
    weights: "tuple[Tensor, ...]"
    """Of those that will be quantized, each (out_features, in_features) float32."""
    schemes: tuple[WeightScheme, ...]
    """Of each weight."""
    inputs: "Tensor"
    """Some tokens, (tokens, in_features) float32."""
    mean: "Tensor"
    """(in_features,) float32: mean of absolute inputs, over more tokens than `inputs` has."""
    largest: "Tensor"
    """Likewise the largest of them."""
    channel: "Tensor"
    """(in_features,) int64: inputs with an equal number have an equal factor."""
    round_weight: "Callable[[int, Tensor], Tensor]"
    """(which, scaled weight) -> what its codes will stand for."""
    round_inputs: "Callable[[Tensor, Tensor], Tensor]"
    """(scaled inputs, scaled `largest`) -> what the codes of these inputs will stand for."""


@dataclass(frozen=True, slots=True)
class FoldSolution:
    """What a fold returns for linears that share their inputs."""

    factors: "Tensor"
    """(in_features,) float32, above zero: weights are multiplied, inputs divided by them."""
    metrics: Mapping[str, float]
    """Logged and compared, never steering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """The extension point: one file in `qtool/folds` with the constant FOLD."""

    summary: str
    """One sentence for `qtool methods`."""
    options: type
    """Frozen dataclass; its fields are the recipe's keys."""
    search: Callable[[FoldProblem, Any], FoldSolution]


def fold_names() -> tuple[str, ...]:
    """Return the sorted names of all folds."""
    return plugins.names(sys.modules[__name__])


def load_fold(name: str) -> Fold:
    """Return a fold by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    return plugins.load(sys.modules[__name__], name, "FOLD", Fold)
