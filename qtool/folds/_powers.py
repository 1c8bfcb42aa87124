"""What folds share: factors that are powers of statistics, and the error that they leave."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core import grouping
from qtool.folds import FoldProblem, FoldSolution
from qtool.scheme import Shape2D

MOST = 1e4
"""Factors are this at most, and one over this at least: norms of float16 must hold them."""
LEAST_OF_MEAN = 1e-4
"""A channel that is nearly silent counts as this part of the mean: other texts may wake it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Factors to try, (in_features,) float32."""

    factors: Tensor
    exponent: float = 0.0
    """Of the inputs, for the report."""


def identity(problem: FoldProblem) -> Candidate:
    """Return factors of one."""
    return Candidate(torch.ones_like(problem.mean))


def powers(inputs: Tensor, weights: Tensor, alpha: float, beta: float) -> Candidate:
    """Return inputs^alpha / weights^beta; both are (in_features,), above zero, `pooled`.

    Normalized so that the largest times the smallest is one.
    """
    factors = (inputs**alpha / weights**beta).nan_to_num(1.0, 1.0, 1.0)
    factors = factors / (factors.max() * factors.min()).sqrt()
    return Candidate(factors.clamp(1 / MOST, MOST), alpha)


def pooled(problem: FoldProblem, values: Tensor, how: str = "mean") -> Tensor:
    """Return values of inputs where those that have one factor have one value, far from zero.

    Args:
        problem: Says which have one factor.
        values: (in_features,), not negative.
        how: `mean` or `amax` over those.
    """
    channel = problem.channel
    found = values.new_zeros(int(channel.max()) + 1)
    found = found.scatter_reduce(0, channel, values, how, include_self=False)
    found = found[channel]
    return found.clamp(min=LEAST_OF_MEAN * float(found.mean())).clamp(min=1e-20)


def relative_weights(problem: FoldProblem) -> Tensor:
    """Return the mean over all rows of |w| relative to the largest of its group, (in_features,).

    Source: AWQ (arXiv 2306.00978), its reference code.
    """
    shares = []
    for weight, scheme in zip(problem.weights, problem.schemes, strict=True):
        size = weight.abs()
        groups = grouping.split(grouping.to_rows(size, scheme), scheme.group_size)
        largest = grouping.to_stored(groups.amax(-1), scheme)
        shares.append(
            size / grouping.spread(largest, scheme, Shape2D(*size.shape)).clamp(min=1e-20)
        )
    return torch.cat(shares).mean(0)


def output_errors(
    problem: FoldProblem, factors: Iterable[Tensor], *, with_inputs: bool
) -> Iterator[float]:
    """Yield, for each of several factors, the mean squared error of the outputs of all linears.

    sum over k of || Q(W_k diag(s)) Q(diag(s)^-1 X) - W_k X ||^2 / numel (AQAS, arXiv 2311.05161,
    equation 1 as notes tell it).

    Args:
        problem: The linears.
        factors: Each (in_features,) float32.
        with_inputs: Inputs are quantized too.
    """
    targets = [problem.inputs @ weight.T for weight in problem.weights]
    for each in factors:
        inputs = problem.inputs / each
        if with_inputs:
            inputs = problem.round_inputs(inputs, problem.largest / each)
        total = 0.0
        for which, weight in enumerate(problem.weights):
            rounded = problem.round_weight(which, weight * each)
            difference = torch.addmm(targets[which], inputs, rounded.T, beta=-1)
            total += float(difference.square_().mean(dtype=torch.float64))
        yield total


def best_of_candidates(
    problem: FoldProblem, candidates: Iterable[Candidate], *, with_inputs: bool
) -> FoldSolution:
    """Return the candidate with the least error of the outputs; the identity is always one."""
    found = [identity(problem), *candidates]
    factors = (one.factors for one in found)
    errors = list(output_errors(problem, factors, with_inputs=with_inputs))
    best = errors.index(min(errors))  # of equal ones the first
    metrics = {"error": errors[best], "error_unfolded": errors[0], "exponent": found[best].exponent}
    return FoldSolution(found[best].factors, metrics)
