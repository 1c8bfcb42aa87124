"""Weights that learn, each pass over them as one Triton kernel: `learned` says what they compute.

In plain torch a weight of three planes takes about twenty passes each way, and a training step of a
small model ten thousand launches, which cost more than its matrix products.

This module imports Triton: only `qtool.core.learned` may import it.
"""

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_PROGRAM = 1024
"""Weights per program."""

_T: TypeAlias = tl.tensor


@triton.jit  # type: ignore[untyped-decorator]
def _values(  # noqa: PLR0913, PLR0917
    scales: _T,
    offsets: _T,
    codes: _T,
    out: _T,
    total: _T,
    groups: _T,
    size: _T,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write offset + sum_i scale_i * b_i for one run of weights."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < total
    group = index // size
    code = tl.load(codes + index, mask=there, other=0).to(tl.int32)
    value = tl.load(offsets + group, mask=there, other=0.0)
    for plane in tl.static_range(BITS):
        scale = tl.load(scales + plane * groups + group, mask=there, other=0.0)
        value += tl.where(((code >> (BITS - 1 - plane)) & 1) != 0, scale, -scale)
    tl.store(out + index, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # noqa: PLR0913, PLR0917
    grad: _T,
    codes: _T,
    out: _T,
    groups: _T,
    size: _T,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum the gradient over each group, once as it is and once by the sign of each plane."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    for plane in tl.static_range(BITS + 1):  # the last one is the offset
        total = tl.zeros((GROUPS,), dtype=tl.float32)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            there = (group[:, None] < groups) & (place[None, :] < size)
            index = group[:, None] * size + place[None, :]
            value = tl.load(grad + index, mask=there, other=0.0).to(tl.float32)
            if plane < BITS:
                code = tl.load(codes + index, mask=there, other=0).to(tl.int32)
                value = tl.where(((code >> (BITS - 1 - plane)) & 1) != 0, value, -value)
            total += tl.sum(value, axis=1)
        tl.store(out + plane * groups + group, total, mask=group < groups)


@triton.jit  # type: ignore[untyped-decorator]
def _moved(  # noqa: PLR0913, PLR0917
    scales: _T,
    offsets: _T,
    codes: _T,
    shifts: _T,
    gaps: _T,
    out: _T,
    total: _T,
    groups: _T,
    size: _T,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the code of the level nearest to each weight's own level and its shift."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < total
    group = index // size
    code = tl.load(codes + index, mask=there, other=0).to(tl.int32)
    offset = tl.load(offsets + group, mask=there, other=0.0)
    wanted = offset
    for plane in tl.static_range(BITS):
        scale = tl.load(scales + plane * groups + group, mask=there, other=0.0)
        wanted += tl.where(((code >> (BITS - 1 - plane)) & 1) != 0, scale, -scale)
    shift = tl.load(shifts + index, mask=there, other=0.0)
    wanted += shift * tl.load(gaps + group, mask=there, other=0.0)
    least = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    best = code
    for other in tl.static_range(2**BITS):
        level = offset
        for plane in tl.static_range(BITS):
            scale = tl.load(scales + plane * groups + group, mask=there, other=0.0)
            level += scale if (other >> (BITS - 1 - plane)) & 1 else -scale
        distance = tl.abs(wanted - level)
        nearer = distance <= least
        best = tl.where(nearer, other, best)
        least = tl.where(nearer, distance, least)
    tl.store(out + index, best.to(tl.uint8), mask=there)


def values(scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    """As `learned.values_of`, (rows, num_groups, group_size) float32."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    _values[(triton.cdiv(codes.numel(), PER_PROGRAM),)](
        scales,
        offsets,
        codes,
        out,
        codes.numel(),
        offsets.numel(),
        codes.shape[-1],
        BITS=len(scales),
        BLOCK=PER_PROGRAM,
    )
    return out


def sums(grad: Tensor, codes: Tensor, num_bits: int) -> Tensor:
    """As `learned.sums_of`, (num_bits + 1, rows, num_groups) float32."""
    out = torch.empty(num_bits + 1, *codes.shape[:2], dtype=torch.float32, device=codes.device)
    size, groups = codes.shape[-1], out[0].numel()
    block = min(PER_PROGRAM, triton.next_power_of_2(size))
    at_once = PER_PROGRAM // block
    _sums[(triton.cdiv(groups, at_once),)](
        grad, codes, out, groups, size, BITS=num_bits, GROUPS=at_once, BLOCK=block
    )
    return out


def moved(scales: Tensor, offsets: Tensor, codes: Tensor, shifts: Tensor, gaps: Tensor) -> Tensor:
    """As `learned.moved_codes`, for few bits."""
    out = torch.empty_like(codes)
    _moved[(triton.cdiv(codes.numel(), PER_PROGRAM),)](
        scales,
        offsets,
        codes,
        shifts,
        gaps,
        out,
        codes.numel(),
        offsets.numel(),
        codes.shape[-1],
        BITS=len(scales),
        BLOCK=PER_PROGRAM,
    )
    return out


def try_out(device: torch.device) -> None:
    """Compile and run the smallest case; raises what is amiss."""
    codes = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
    values(torch.ones(1, 1, 1, device=device), torch.ones(1, 1, device=device), codes)
