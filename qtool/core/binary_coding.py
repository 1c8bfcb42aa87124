"""Binary coding (BCQ): w = offset + sum_i scale_i * b_i with b_i in {-1, +1}, per group.

Source: Park et al. 2022 (LUT-GEMM, arXiv 2206.09557). `alternating` fits the scales.

A code is an integer whose bits are the signs, plane 0 the most significant: with scales
2^(k-1) s, ..., s it is the affine code. All functions work on a flat list of groups:
weights (groups, group_size), scales (groups, num_bits), offsets (groups,).
"""

from functools import cache

import torch
from torch import Tensor, nn


def signs(num_bits: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the sign of each plane in each code: (2^num_bits, num_bits)."""
    codes = torch.arange(2**num_bits, device=device).unsqueeze(1)
    bits = torch.arange(num_bits - 1, -1, -1, device=device)
    return (2 * ((codes >> bits) & 1) - 1).to(dtype)


@cache
def design(num_bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the signs of each code, and a one for the offset: (2^num_bits, num_bits + 1)."""
    return nn.functional.pad(signs(num_bits, device=device, dtype=dtype), (0, 1), value=1.0)


def levels(scales: Tensor, offsets: Tensor) -> Tensor:
    """Return the value of each code: (groups, 2^num_bits)."""
    table = signs(scales.shape[-1], device=scales.device, dtype=scales.dtype)
    return offsets.unsqueeze(-1) + scales @ table.T


def assign(groups: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Return the code of the nearest level, (groups, group_size) uint8; ties go up.

    Works for scales of any sign and order: levels are sorted here.
    """
    values, order = levels(scales.float(), offsets.float()).sort(-1)
    middles = (values[:, 1:] + values[:, :-1]) / 2
    position = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    for column in middles.unbind(-1):
        position += groups >= column.unsqueeze(-1)
    return order.to(torch.uint8).gather(-1, position.long())


def canonical(scales: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Make scales non-negative and descending; the dequantized weights don't change.

    Args:
        scales: (groups, num_bits), any sign and order.
        codes: (groups, group_size) uint8.

    Returns:
        The same two, with flipped signs toggled in the codes and planes exchanged bit for bit.
    """
    num_bits = scales.shape[-1]
    order = scales.abs().argsort(dim=-1, descending=True, stable=True)
    result = torch.zeros_like(codes)
    for plane in range(num_bits):
        source = order[:, plane : plane + 1]  # (groups, 1)
        flip = (scales.gather(-1, source) < 0).to(torch.uint8)
        bit = (codes >> (num_bits - 1 - source).to(torch.uint8)) & 1
        result |= (bit ^ flip) << (num_bits - 1 - plane)
    return scales.abs().gather(-1, order), result


def scales_from_affine(
    scales: Tensor, zero_points: Tensor, *, num_bits: int
) -> tuple[Tensor, Tensor]:
    """Return the plane scales and offsets of an affine grid; its codes stay as they are.

    s (n - z) = s ((2^k - 1)/2 - z) + sum_i s 2^(i-1) b_i with b_i the sign of bit i of n. Exact in
    real arithmetic, and in float64 for float16 scales.

    Returns:
        Of scales (...) and zero points (...): plane scales (..., num_bits), descending, and
        offsets (...), in the dtype of `scales`.
    """
    powers = 2.0 ** torch.arange(num_bits - 2, -2, -1, device=scales.device, dtype=scales.dtype)
    offsets = scales * ((2**num_bits - 1) / 2 - zero_points.to(scales.dtype))
    return scales.unsqueeze(-1) * powers, offsets
