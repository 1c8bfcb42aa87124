"""Activation-aware weight quantization: factors for the error of the weights alone.

Source: Lin et al. 2023 (AWQ, arXiv 2306.00978). Activations stay in 16 bits while it searches: the
limit of `aqas` where only weights are quantized.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from qtool.folds import Fold, FoldProblem, FoldSolution
from qtool.folds._powers import Candidate, best_of_candidates, pooled, powers, relative_weights
from qtool.recipe.values import WholeNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqOptions:
    """Options of `awq`."""

    exponents: Annotated[WholeNumber, Field(ge=1, le=100)] = 20
    """Exponents of the inputs that are tried, up to 1, each with and without the weights."""


def search_awq(problem: FoldProblem, options: AwqOptions) -> FoldSolution:
    """Search with quantized weights and inputs as they are."""
    return best_of_candidates(problem, _candidates(problem, options), with_inputs=False)


def _candidates(problem: FoldProblem, options: AwqOptions) -> Iterator[Candidate]:
    mean, weights = pooled(problem, problem.mean), pooled(problem, relative_weights(problem))
    for step in range(1, options.exponents + 1):
        alpha = step / options.exponents
        yield powers(mean, weights, alpha, 0.0)
        if alpha < 1:
            yield powers(mean, weights, alpha, 1 - alpha)


FOLD = Fold(
    summary="Least error of the outputs with weights quantized and activations in 16 bits.",
    options=AwqOptions,
    search=search_awq,
)
