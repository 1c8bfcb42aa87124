"""dINT: whole multiples of a step, and plus and minus half a step.

Source: Lee et al. 2023 (arXiv 2311.05161), which keeps small weights from becoming zero by two
codes that multiply by a shift. What the paper doesn't say is our design: which codes they are, the
rule for ties, the search of the scale.

A code c of k bits means, in steps, c - zero_point up to `top_code`, and then +1/2 and -1/2. Doubled
values are whole numbers. Weights are rows of groups (rows, num_groups, group_size), scales and zero
points (rows, num_groups), see `grouping`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core.affine import SMALLEST_SCALE, best_of_fits
from qtool.core.grids import AffineGrid, Tables

FEWEST_BITS = 3
"""With fewer, a symmetric grid has no step left."""
WIDEST_IN_INT8 = {False: 6, True: 7}
"""Bits of a grid that isn't symmetric, or is, up to which int8 holds doubled values."""
ZERO_BELOW, WHOLE_FROM = 0.25, 0.75
"""In steps: the middles between 0 and half a step, and between that and a whole one."""


def top_code(num_bits: int) -> int:
    """Return the highest of the codes that are whole steps; +1/2 and -1/2 are the next two."""
    return int(2**num_bits) - 3


def middle_code(num_bits: int) -> int:
    """Return the zero point of a symmetric grid: as many steps below it, and one more above."""
    return int(2 ** (num_bits - 1)) - 2


def doubled_values(codes: Tensor, zero_points: Tensor, num_bits: int) -> Tensor:
    """Return what codes mean in half steps, int16: 2 (code - zero_point), or 1, or -1.

    int8 holds it up to 6 bits, and where grids are symmetric up to 7. Zero points broadcast.
    """
    codes, top = codes.to(torch.int16), top_code(num_bits)
    halves = 2 * (top - codes) + 3  # of the two codes after the top
    return torch.where(codes > top, halves, 2 * (codes - zero_points.to(torch.int16)))


def nearest_in_steps(
    steps: Tensor, zero_points: Tensor, top: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Return the nearest codes of values that are given in steps, float, and these codes' steps.

    A tie goes to the half at a quarter, to the whole step at three quarters, else to the even one.
    Zero points and top broadcast.
    """
    whole = torch.minimum(torch.maximum(steps.round(), -zero_points), top - zero_points)
    size = steps.abs()
    # Where a grid ends at zero, the half beyond is nearest to all that lies there.
    is_half = (size >= ZERO_BELOW) & ((size < WHOLE_FROM) | (whole == 0))
    below = (steps < 0).to(steps.dtype)
    codes = torch.where(is_half, top + 1 + below, whole + zero_points)
    return codes, torch.where(is_half, 0.5 - below, whole)


def fit_dint(
    groups: Tensor, *, num_bits: int, symmetric: bool, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """Fit the grid of each group to its range, which is widened to contain zero.

    Args:
        groups: (rows, num_groups, group_size) float32.
        num_bits: 3 to 8.
        symmetric: Fix the zero point to `middle_code`.
        clip_ratio: Fraction of the range that the grid covers, in (0, 1].

    Returns:
        Scales (rows, num_groups) float16, > 0, and zero points (rows, num_groups) uint8.
    """
    low = groups.amin(-1).clamp(max=0) * clip_ratio
    high = groups.amax(-1).clamp(min=0) * clip_ratio
    if symmetric:
        scales = torch.maximum(-low, high) / middle_code(num_bits)
    else:
        scales = (high - low) / top_code(num_bits)
    scales = scales.clamp(min=SMALLEST_SCALE).to(torch.float16)
    if symmetric:
        return scales, torch.full_like(scales, middle_code(num_bits), dtype=torch.uint8)
    zero_points = (-low / scales.float()).round().clamp(0, top_code(num_bits))
    return scales, zero_points.to(torch.uint8)


def search_dint(
    groups: Tensor,
    importance: Tensor,
    *,
    num_bits: int,
    symmetric: bool,
    clip_ratios: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Fit, as `fit_dint`, with the clip ratio of the smallest squared error of each group.

    `importance` weighs the errors, and broadcasts to `groups`. The best ratio isn't that of a grid
    without the halves: these let a group have a longer step.
    """
    tried = (
        fit_dint(groups, num_bits=num_bits, symmetric=symmetric, clip_ratio=ratio)
        for ratio in clip_ratios
    )

    def values(scales: Tensor, zeros: Tensor) -> Tensor:
        return nearest_dint(groups, scales, zeros, num_bits=num_bits)[1]

    return best_of_fits(groups, importance, tried, values)


def nearest_dint(
    groups: Tensor, scales: Tensor, zero_points: Tensor, *, num_bits: int
) -> tuple[Tensor, Tensor]:
    """Return the nearest codes, uint8, and their levels, float32: both shaped as the groups."""
    steps, zeros = (part.float().unsqueeze(-1) for part in (scales, zero_points))
    codes, chosen = nearest_in_steps(groups / steps, zeros, top_code(num_bits))
    return codes.to(torch.uint8), chosen * steps


def pick_dint(tables: Tables, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and levels; tables are scales, zero points and top code."""
    scales, zeros, top = tables
    codes, chosen = nearest_in_steps(values / scales[column], zeros[column], top)
    return codes.to(torch.uint8), chosen * scales[column]


@dataclass(slots=True)
class DintGrid(AffineGrid):
    """scale * (code - zero_point), and plus and minus half a scale."""

    pick = staticmethod(pick_dint)

    def top(self) -> int:
        """Return the highest code that is whole steps."""
        return top_code(self.num_bits)

    def units(self, codes: Tensor, zero_points: Tensor) -> Tensor:
        """Return what codes mean in steps, float32."""
        return doubled_values(codes, zero_points, self.num_bits).float() / 2
