"""SmoothQuant: the range of activations shared with the weights by a formula, without a search.

Source: Xiao et al. 2022 (SmoothQuant, arXiv 2211.10438), equation 4.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from qtool.folds import Fold, FoldProblem, FoldSolution
from qtool.folds._powers import identity, output_errors, pooled, powers
from qtool.recipe.values import Number


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuantOptions:
    """Options of `smoothquant`."""

    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """How much of the range goes from the inputs into the weights."""


def smooth(problem: FoldProblem, options: SmoothQuantOptions) -> FoldSolution:
    """Return max|x|^alpha / max|w|^(1 - alpha) for each input."""
    weights = torch.cat(problem.weights).abs().amax(0)
    chosen = powers(
        pooled(problem, problem.largest, "amax"),
        pooled(problem, weights, "amax"),
        options.alpha,
        1 - options.alpha,
    )
    both = (chosen.factors, identity(problem).factors)
    error, unfolded = output_errors(problem, both, with_inputs=True)
    metrics = {"error": error, "error_unfolded": unfolded, "exponent": options.alpha}
    return FoldSolution(chosen.factors, metrics)


FOLD = Fold(
    summary="Shares the range of activations with the weights by a formula; searches nothing.",
    options=SmoothQuantOptions,
    search=smooth,
)
