"""Affine quantization: w = scale * (code - zero_point), per group.

All functions work on rows of groups (see `grouping`): weights (rows, num_groups, group_size),
scales and zero points (rows, num_groups).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qtool.core import grouping
from qtool.scheme import Shape2D, WeightScheme

SMALLEST_SCALE = 2.0**-24  # smallest positive float16: a scale must not round to zero


def fit_min_max(
    groups: Tensor, *, num_bits: int, symmetric: bool, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """Fit the grid of each group to its range, which is widened to contain zero.

    Zero must be inside: an integer zero point can't shift a grid that lies wholly on one side
    (padding of a short group is zero as well, so it never changes the range).

    Args:
        groups: (rows, num_groups, group_size) float32.
        num_bits: 1 to 8.
        symmetric: Fix the zero point to 2^(num_bits - 1).
        clip_ratio: Fraction of the range that the grid covers, in (0, 1].

    Returns:
        Scales (rows, num_groups) float16, > 0, and zero points (rows, num_groups) uint8.
    """
    steps = 2**num_bits - 1
    low = groups.amin(-1).clamp(max=0) * clip_ratio
    high = groups.amax(-1).clamp(min=0) * clip_ratio
    if symmetric:
        reach = torch.maximum(-low, high)
        low, high = -reach, reach
    scales = ((high - low) / steps).clamp(min=SMALLEST_SCALE).to(torch.float16)
    if symmetric:
        return scales, torch.full_like(scales, 2 ** (num_bits - 1), dtype=torch.uint8)
    zero_points = (-low / scales.float()).round().clamp(0, steps)
    return scales, zero_points.to(torch.uint8)


def fit_search(
    groups: Tensor,
    importance: Tensor,
    *,
    num_bits: int,
    symmetric: bool,
    clip_ratios: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Fit, as `fit_min_max`, with the clip ratio of the smallest squared error of each group.

    `importance` weighs the errors, and broadcasts to `groups`.
    """

    def values(scales: Tensor, zeros: Tensor) -> Tensor:
        codes = nearest_codes(groups, scales, zeros, num_bits=num_bits)
        return affine_values(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1), torch.float32)

    tried = (
        fit_min_max(groups, num_bits=num_bits, symmetric=symmetric, clip_ratio=ratio)
        for ratio in clip_ratios
    )
    return best_of_fits(groups, importance, tried, values)


def best_of_fits(
    groups: Tensor,
    importance: Tensor,
    fits: Iterable[tuple[Tensor, Tensor]],
    values: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return, of several scales and zero points, those of the smallest squared error of each group.

    Args:
        groups: (rows, num_groups, group_size) float32.
        importance: Weighs the errors, and broadcasts to `groups`.
        fits: Scales (rows, num_groups) float16 and zero points (rows, num_groups) uint8 to try.
        values: (scales, zero points) -> the groups as these would store them, float32.
    """
    best_error = torch.full(groups.shape[:-1], torch.inf, device=groups.device)
    best_scales = torch.ones_like(best_error, dtype=torch.float16)
    best_zeros = torch.zeros_like(best_error, dtype=torch.uint8)
    for scales, zeros in fits:
        error = (importance * (values(scales, zeros) - groups).square_()).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def nearest_codes(
    groups: Tensor, scales: Tensor, zero_points: Tensor, *, num_bits: int, rounding: float = 0.0
) -> Tensor:
    """Return the nearest codes, (rows, num_groups, group_size) uint8.

    With `rounding` the thresholds between neighbours are shifted by that share of a step: above 0
    towards zero goes what is nearly in the middle, on either side of zero alike.
    """
    steps = groups / scales.float().unsqueeze(-1)
    if rounding:
        steps = steps.sign() * (steps.abs() + (0.5 - rounding)).floor_()
    codes = steps + zero_points.unsqueeze(-1)
    return codes.round_().clamp_(0, 2**num_bits - 1).to(torch.uint8)


def affine_values(codes: Tensor, scales: Tensor, zero_points: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scale * (code - zero_point) in `dtype`; parameters broadcast against the codes."""
    return (codes.to(dtype) - zero_points.to(dtype)) * scales.to(dtype)


def round_weight(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Return a weight as rounding to nearest leaves it, nothing of it packed.

    (out_features, in_features) float32, both ways.
    """
    groups = grouping.split(grouping.to_rows(weight, scheme), scheme.group_size)
    scales, zeros = fit_min_max(
        groups, num_bits=scheme.num_bits, symmetric=scheme.symmetric, clip_ratio=1.0
    )
    codes = nearest_codes(groups, scales, zeros, num_bits=scheme.num_bits)
    values = affine_values(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1), torch.float32)
    rows = grouping.join(values, scheme.grouped_length(Shape2D(*weight.shape)))
    return grouping.to_rows(rows, scheme)
