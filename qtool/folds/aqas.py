"""Activation-quantization-aware scaling: factors for the joint error of weights and activations.

Source: Lee et al. 2023 (AQAS, arXiv 2311.05161), of which the objective is known: the error of the
outputs with both quantizers on. Start and search are our design: a closed form, and AWQ's grid of
exponents for the mean and for the largest of the inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qtool.folds import Fold, FoldProblem, FoldSolution
from qtool.folds._powers import Candidate, best_of_candidates, pooled, powers, relative_weights
from qtool.recipe.values import WholeNumber


@dataclass(frozen=True, slots=True, kw_only=True)
class AqasOptions:
    """Options of `aqas`."""

    exponents: Annotated[WholeNumber, Field(ge=1, le=100)] = 20
    """Exponents of the inputs that are tried, up to 1, each with and without the weights."""


def search_aqas(problem: FoldProblem, options: AqasOptions) -> FoldSolution:
    """Search with weights and inputs quantized."""
    return best_of_candidates(problem, _candidates(problem, options), with_inputs=True)


def _candidates(problem: FoldProblem, options: AqasOptions) -> Iterator[Candidate]:
    yield closed_form(problem)
    weights = pooled(problem, relative_weights(problem))
    mean, largest = pooled(problem, problem.mean), pooled(problem, problem.largest, "amax")
    for inputs, step in product((mean, largest), range(1, options.exponents + 1)):
        alpha = step / options.exponents
        yield powers(inputs, weights, alpha, 0.0)
        if alpha < 1:
            yield powers(inputs, weights, alpha, 1 - alpha)


def closed_form(problem: FoldProblem) -> Candidate:
    """Return the root of the inputs' root mean squares over those of the weights' columns.

    With steps dw and da that don't depend on the factors, a channel adds, but for constants,
    dw^2 x^2 / s^2 + da^2 w^2 s^2 to the error, which is least at s^2 = (dw / da) (x / w); what
    all channels have in common changes nothing. Our derivation.
    """
    inputs = problem.inputs.square().mean(0).sqrt()
    weights = sum(weight.square().mean(0) for weight in problem.weights)
    assert isinstance(weights, Tensor)
    return powers(pooled(problem, inputs), pooled(problem, weights.sqrt()), 0.5, 0.5)


FOLD = Fold(
    summary="Least error of the outputs with weights and activations quantized; both decide.",
    options=AqasOptions,
    search=search_aqas,
)
