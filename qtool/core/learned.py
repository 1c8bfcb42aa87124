"""Weights that learn: offset + sum_i scale_i * b_i, differentiable in scales and offsets.

Of a binary-coded weight these are its parameters, of an affine one a function of them (docs/format.md,
section 10), so one arithmetic serves both. Signs are taken from the codes when they are needed,
forwards and backwards: a weight costs one byte while it learns, beside its gradient.

All functions work on rows of groups (see `grouping`): codes (rows, num_groups, group_size) uint8,
scales (num_bits, rows, num_groups), offsets (rows, num_groups).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtool.core.binary_coding import assign


FEW_BITS = 4
"""Up to so many, all levels are tried."""


def _sign(codes: Tensor, bit: int, dtype: torch.dtype) -> Tensor:
    return ((codes >> bit) & 1).to(dtype).mul(2).sub(1)


def _combine(scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    values = offsets.unsqueeze(-1).expand(codes.shape)
    for index, scale in enumerate(scales):
        values = values + _sign(codes, len(scales) - 1 - index, scales.dtype) * scale.unsqueeze(-1)
    return values


def _pull_back(grad: Tensor, codes: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    bits = reversed(range(num_bits))
    scales = [(grad * _sign(codes, bit, grad.dtype)).sum(-1) for bit in bits]
    return torch.stack(scales), grad.sum(-1)


@functools.cache
def _fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuse the passes over a weight into one, on a card."""
    return torch.compile(function, dynamic=False)


def _run(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    on_card = arguments[0].is_cuda
    return (_fast(function) if on_card else function)(*arguments)


class _Planes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(codes)
        ctx.num_bits = len(scales)
        return _run(_combine, scales, offsets, codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        return (*_run(_pull_back, grads[0].contiguous(), *ctx.saved_tensors, ctx.num_bits), None)


def planes_values(scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    """Return the values of the codes, (rows, num_groups, group_size) in the dtype of the scales."""
    values: Tensor = _Planes.apply(scales, offsets, codes)  # type: ignore[no-untyped-call]
    return values


def nearest_planes(scales: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    """Return the codes of the levels nearest to values (rows, num_groups, group_size)."""
    if len(scales) <= FEW_BITS:
        codes: Tensor = _run(_nearest, scales, offsets, values)
        return codes
    flat = scales.flatten(1).T, offsets.flatten()
    return assign(values.flatten(0, 1), *flat).view(values.shape)


def _nearest(scales: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    """Try every level: fused, that is one pass over the values."""
    num_bits = len(scales)
    least = torch.full_like(values, torch.inf)
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for code in range(2**num_bits):
        level = offsets
        for index in range(num_bits):
            bit = (code >> (num_bits - 1 - index)) & 1
            level = level + scales[index] if bit else level - scales[index]
        distance = (values - level.unsqueeze(-1)).abs()
        codes = torch.where(distance <= least, code, codes)
        least = torch.minimum(distance, least)
    return codes.to(torch.uint8)


def with_gradient(values: Tensor, source: Tensor) -> Tensor:
    """Return the values as they are; their gradient goes to `source` too: straight through.

    Source: Bengio et al. 2013 (arXiv 1308.3432), section 4.
    """
    return values + (source - source.detach())
