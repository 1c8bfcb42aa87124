"""Groups of linears as the step makes them, with a few inputs that are far louder than others."""

from typing import Any

import torch
from torch import Tensor

from qtool.core.affine import round_weight
from qtool.folds import FoldProblem
from qtool.recipe.activations import ActivationsSection
from qtool.scheme import WeightScheme
from qtool.steps.fold import input_rounding
from tests.helpers import normal

SCHEME = WeightScheme(num_bits=4, group_size=16)


def fold_problem(
    *,
    granularity: str | None = "token",
    channel: Tensor | None = None,
    seed: int = 0,
    **changes: Any,
) -> FoldProblem:
    """Return two linears with 32 inputs, of which two are thirty times as loud."""
    loud = torch.ones(32)
    loud[[3, 19]] = 30
    inputs = normal(64, 32, seed=seed) * loud
    activations = None
    if granularity is not None:
        activations = ActivationsSection.model_validate({"granularity": granularity})
    weights = (normal(24, 32, seed=seed + 1), normal(8, 32, seed=seed + 2))
    values: dict[str, Any] = {
        "name": "linear",
        "weights": weights,
        "schemes": (SCHEME, SCHEME),
        "inputs": inputs,
        "mean": inputs.abs().mean(0),
        "largest": inputs.abs().amax(0),
        "channel": torch.arange(32) if channel is None else channel,
        "round_weight": lambda _, weight: round_weight(weight, SCHEME),
        "round_inputs": input_rounding(activations),
    }
    return FoldProblem(**{**values, **changes})
