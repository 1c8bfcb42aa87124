"""Scales and offsets of few bits: whole multiples of one unit per row of groups.

All plane scales and offsets of a row are `multiple * row_scale * 2^-resolution`, rounded to
float16. What rounding them costs is an absolute error, so one unit serves all planes, and a plane
that is half as large needs one bit less. The widths are measured (docs/adr/0018): more bits for
each parameter are worth less than smaller groups.

Parameters are `theta`, (rows, num_groups, num_bits + 1), as solvers have them: plane scales, and
the offset last. Row scales are (rows,) float16.
"""

from functools import cache

import torch
from torch import Tensor

LEAST_RESOLUTION = 5


def resolution(num_bits: int) -> int:
    """Return how many halvings of the row scale make the unit."""
    return max(LEAST_RESOLUTION, num_bits + 2)


def code_widths(num_bits: int) -> list[int]:
    """Return the bits that the code of each plane scale has, and that of the offset, last.

    The second plane may be as large as the first; from there on the bound halves. An offset has a
    sign.
    """
    finest = resolution(num_bits)
    return [finest - max(0, plane - 1) for plane in range(num_bits)] + [finest + 1]


def limits(num_bits: int) -> list[tuple[int, int]]:
    """Return the lowest and highest multiple of each parameter, the offset last."""
    *widths, last = code_widths(num_bits)
    half = 2 ** (last - 1)
    return [*((0, 2**width - 1) for width in widths), (-half, half - 1)]


def units_of(row_scales: Tensor, num_bits: int) -> Tensor:
    """Return the unit of each row scale, float32 in its shape."""
    return row_scales.float() * 2.0 ** -resolution(num_bits)


@cache
def bounds_of(num_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `limits` as tensors, (num_bits + 1,) float32: made once, as a step may be recorded."""
    lowest, highest = torch.tensor(
        limits(num_bits), dtype=torch.float32, device=device
    ).T.contiguous()
    return lowest, highest


def fit_row_scales(theta: Tensor) -> Tensor:
    """Return the smallest row scales under which no parameter is cut off: (rows,) float16.

    Plane scales of `theta` are not negative and descend. What float16 can't hold becomes infinite.
    """
    num_bits = theta.shape[-1] - 1
    lowest, highest = bounds_of(num_bits, theta.device)
    units = torch.maximum(theta / highest, theta / lowest.clamp(max=-1)).amax((1, 2))
    return (units * 2 ** resolution(num_bits)).to(torch.float16)


def to_multiples(
    values: Tensor,
    row_scales: Tensor,
    num_bits: int,
    bounds: tuple[int, int] | tuple[Tensor, Tensor],
) -> Tensor:
    """Return the nearest multiples of the unit, whole float32 numbers within bounds.

    Row scales and bounds broadcast to the values.
    """
    units = units_of(row_scales, num_bits)
    multiples = (values / torch.where(units > 0, units, torch.inf)).round()
    return multiples.clamp(*bounds)


def from_multiples(multiples: Tensor, row_scales: Tensor, num_bits: int) -> Tensor:
    """Return what multiples of the unit mean, float16.

    The product has at most 22 bits, so it is exact in float32 and rounded once.
    """
    return (multiples * units_of(row_scales, num_bits)).to(torch.float16)


def all_to_multiples(theta: Tensor, row_scales: Tensor) -> Tensor:
    """Return the nearest multiples of all parameters, in the shape of `theta`, float32."""
    num_bits = theta.shape[-1] - 1
    bounds = bounds_of(num_bits, theta.device)
    return to_multiples(theta, row_scales[:, None, None], num_bits, bounds)


def rounded(theta: Tensor, row_scales: Tensor) -> Tensor:
    """Return the nearest values that can be stored, in the shape of `theta`, float32."""
    multiples = all_to_multiples(theta, row_scales)
    return from_multiples(multiples, row_scales[:, None, None], theta.shape[-1] - 1).float()
