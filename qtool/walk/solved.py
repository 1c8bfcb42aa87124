"""What a walk is told: how inputs of linears are treated, and what becomes of the linears."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qtool.scheme import ActivationScheme
from qtool.walk.shares import ALL_SAMPLES, Share
from qtool.walk.statistics import RowGroups


def _never(_layer: str, _inputs: Iterable[Tensor]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class InputRules:
    """What a recipe does with the inputs of linears."""

    weigh: Callable[[], Mapping[str, RowGroups]] | None = None
    """Gives groups of output channels of each layer, with their weights of the tokens; None: there
    are none."""
    scheme: Callable[[str, Iterable[Tensor]], ActivationScheme | None] = _never
    """(layer, what it sees of the training samples, each (tokens, in_features)) -> how its inputs
    are quantized; None: they aren't."""
    share: Share = ALL_SAMPLES
    """The samples whose inputs are looked at."""


NO_RULES = InputRules()
"""Inputs of all linears are measured as they are, all tokens alike."""


@dataclass(frozen=True, slots=True)
class SolvedLinear:
    """What becomes of a linear of the blocks."""

    weight: Callable[[], Tensor]
    """Gives its dequantized weight, (out_features, in_features) float32."""
    activation: ActivationScheme | None = None
    """How its inputs are quantized; None: they aren't."""
    bias: Tensor | None = None
    """Its bias, (out_features,); None: it has the original's, or none."""
