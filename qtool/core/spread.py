"""How values at many places are spread: mean, percentiles and extremes, each with its error."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PERCENTS = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was found on a sample, in the unit of what it is of."""

    value: float
    standard_error: float | None
    """None: the sample doesn't say."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are spread, all in their unit."""

    mean: Estimate
    maximum: float
    percentiles: Mapping[str, Estimate]
    """By percent, such as "99.9"; 50 is the median."""
    minimum: float


def spread_of(values: Tensor) -> Spread:
    """Return how values, (count,) float64 from two on, are spread; errors take them as independent.

    A percentile's error is half of the distance between the percentiles that lie one standard
    deviation of the binomial share below and above; where one is beyond the sample, there is none.
    Extremes have no error.
    """
    ordered = values.double().sort().values
    return Spread(
        mean=estimated_mean(values),
        maximum=float(ordered[-1]),
        percentiles={f"{percent:g}": _percentile(ordered, percent / 100) for percent in PERCENTS},
        minimum=float(ordered[0]),
    )


def estimated_mean(values: Tensor) -> Estimate:
    """Return the mean of values, (count,) from two on, and its standard error."""
    values = values.double()
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def root_mean_square(values: Tensor) -> Estimate:
    """Return the root of the mean square, (count,) from two on; its error is to first order."""
    squares = estimated_mean(values.double().square())
    assert squares.standard_error is not None
    root = math.sqrt(squares.value)
    return Estimate(root, squares.standard_error / (2 * root) if root else 0.0)


def _percentile(ordered: Tensor, share: float) -> Estimate:
    """Return a percentile of ascending values, between two of them in proportion."""
    deviation = math.sqrt(share * (1 - share) / len(ordered))
    shares = torch.tensor([share - deviation, share, share + deviation], dtype=torch.float64)
    low, value, high = torch.quantile(ordered, shares.clamp(0, 1)).tolist()
    known = share - deviation >= 0 and share + deviation <= 1
    return Estimate(value, (high - low) / 2 if known else None)
