"""Weights that learn: offset + sum_i scale_i * b_i, differentiable in scales and offsets.

Of a binary-coded weight these are its parameters, of an affine one a function of them
(docs/format.md, section 10), so one arithmetic serves both. Signs are taken from the codes when
they are needed, forwards and backwards: a weight costs one byte while it learns, beside its
gradient.

All functions work on rows of groups (see `grouping`): codes (rows, num_groups, group_size) uint8,
scales (num_bits, rows, num_groups), offsets (rows, num_groups), all float32.
"""

from types import ModuleType

import torch
from torch import Tensor

from qtool.core.autograd import AutogradContext
from qtool.core.binary_coding import assign
from qtool.core.kernel_modules import usable_kernels

MOST_SEARCHED_BITS = 4
"""Up to so many, a kernel tries all levels."""


def values_of(scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    """Return the values of the codes, (rows, num_groups, group_size)."""
    values = offsets.unsqueeze(-1).expand(codes.shape)
    for index, scale in enumerate(scales):
        values = values + _sign(codes, len(scales) - 1 - index) * scale.unsqueeze(-1)
    return values


def sums_of(grad: Tensor, codes: Tensor, num_bits: int) -> Tensor:
    """Return the gradient of scales, then of offsets, from that of the values.

    (num_bits + 1, rows, num_groups).
    """
    signed = [(grad * _sign(codes, bit)).sum(-1) for bit in reversed(range(num_bits))]
    return torch.stack([*signed, grad.sum(-1)])


def mean_gaps(scales: Tensor) -> Tensor:
    """Return how far neighbouring levels of a group are apart on average, (rows, num_groups)."""
    return 2 * scales.sum(0) / (2 ** len(scales) - 1)


def gaps_of(scales: Tensor) -> Tensor:
    """Return what a step of codes is, (rows, num_groups): what their least bit adds to a value."""
    return 2 * scales[-1]


def moved_codes(scales: Tensor, offsets: Tensor, codes: Tensor, shifts: Tensor) -> Tensor:
    """Return the code of the level nearest to each weight's own level and its shift.

    Args:
        scales: See above; descending.
        offsets: See above.
        codes: See above.
        shifts: (rows, num_groups, group_size), in steps of codes.
    """
    gaps = gaps_of(scales)
    kernels = _kernels_for(codes.device)
    if kernels is not None and len(scales) <= MOST_SEARCHED_BITS:
        scales, offsets = scales.contiguous(), offsets.contiguous()
        found: Tensor = kernels.moved(scales, offsets, codes, shifts, gaps)
        return found
    wanted = values_of(scales, offsets, codes) + shifts * gaps.unsqueeze(-1)
    flat = scales.flatten(1).T, offsets.flatten()
    return assign(wanted.flatten(0, 1), *flat).view(codes.shape)


def planes_values(
    scales: Tensor, offsets: Tensor, codes: Tensor, shifts: Tensor | None = None
) -> Tensor:
    """Return what `values_of` does, differentiable, the fastest way that the device has.

    Shifts, as `moved_codes` has them, don't change it, but get the gradient: straight through.
    """
    values: Tensor = _Planes.apply(scales, offsets, codes, shifts)  # type: ignore[no-untyped-call]
    return values


def planes_sums(grad: Tensor, codes: Tensor, num_bits: int) -> Tensor:
    """Return what `sums_of` does, the fastest way that the device has."""
    kernels = _kernels_for(codes.device)
    compute = sums_of if kernels is None else kernels.sums
    found: Tensor = compute(grad.contiguous(), codes, num_bits)
    return found


def with_gradient(values: Tensor, source: Tensor) -> Tensor:
    """Return the values as they are; their gradient goes to `source` too: straight through.

    Source: Bengio et al. 2013 (arXiv 1308.3432), section 4.
    """
    return values + (source - source.detach())


class _Planes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        scales: Tensor,
        offsets: Tensor,
        codes: Tensor,
        shifts: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, None if shifts is None else gaps_of(scales))
        ctx.num_bits = len(scales)
        kernels = _kernels_for(codes.device)
        compute = values_of if kernels is None else kernels.values
        return compute(scales.contiguous(), offsets.contiguous(), codes)

    @staticmethod
    def backward(
        ctx: AutogradContext, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        codes, gaps = ctx.saved_tensors
        sums = planes_sums(grads[0], codes, ctx.num_bits)
        shifted = None if gaps is None else grads[0] * gaps.unsqueeze(-1)
        return sums[:-1], sums[-1], None, shifted


def _sign(codes: Tensor, bit: int) -> Tensor:
    return ((codes >> bit) & 1).float().mul_(2).sub_(1)


def _kernels_for(device: torch.device) -> ModuleType | None:
    """Return `learned_kernels`: each pass over a weight as one launch."""
    return usable_kernels("learned_kernels", "try_out", device)
