"""What is done to a weight every p steps, so that it learns to bear it: C, then D, of DeepTwist.

Modulated regularization frequency (Lee et al. 2021, arXiv 2105.01875; its predecessor, DeepTwist,
arXiv 1810.12823): a weight learns as it is, and every p steps becomes what its compressed form
would be. p says how strong that is, together with the compression.
"""

import torch
from torch import Tensor

from qtool.core import alternating, binary_coding, grouping
from qtool.scheme import Shape2D, WeightScheme

ROUNDS = 3
"""Of alternation between codes and scales: compressing often mustn't be dear."""


def in_planes_of(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes and levels nearest to a weight, and what they make.

    Args:
        weight: (out_features, in_features) float32.
        scheme: Bits and grouping.

    Returns:
        Codes (rows, num_groups, group_size) uint8; scales, descending, with the offset last,
        (rows, num_groups, num_bits + 1) float16; the weight that they make.
    """
    groups = grouping.split(grouping.to_rows(weight, scheme), scheme.group_size)
    length, flat = scheme.grouped_length(Shape2D(*weight.shape)), groups.flatten(0, 1)
    matters = grouping.valid(length, scheme.group_size, weight.device).float()
    matters = matters.expand(groups.shape).flatten(0, 1)
    options = alternating.FitOptions(
        num_bits=scheme.num_bits, offset=not scheme.symmetric, rounds=ROUNDS, clip_ratios=(1.0,)
    )
    found, offsets, _ = alternating.fit(flat, matters, options)
    scales = found.abs().sort(-1, descending=True).values
    theta = torch.cat([scales, offsets.unsqueeze(-1)], -1).to(torch.float16)
    stored = theta.float()
    codes = binary_coding.assign(flat, stored[:, :-1], stored[:, -1])
    levels = binary_coding.levels(stored[:, :-1], stored[:, -1])
    made = levels.gather(-1, codes.long()).view(groups.shape)
    back = grouping.to_rows(grouping.join(made, length), scheme)
    return codes.view(groups.shape), theta.unflatten(0, groups.shape[:2]), back


def pruned(weight: Tensor, sparsity: float, saliency: Tensor | None = None) -> Tensor:
    """Return a weight whose least values, this share of them, are zero.

    Args:
        weight: Any shape, float.
        sparsity: The share.
        saliency: How much each value matters, in the weight's shape; None: its magnitude (Han et
            al. 2015, arXiv 1506.02626).
    """
    matters = weight.abs() if saliency is None else saliency
    return torch.where(highest(matters, share_left(sparsity, weight.numel())), weight, 0.0)


def share_left(sparsity: float, count: int) -> int:
    """Return how many of so many values pruning leaves."""
    return count - round(sparsity * count)


def highest(values: Tensor, count: int) -> Tensor:
    """Return where the highest values are, exactly so many, as bool; of equals the first ones."""
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    bound = flat.kthvalue(len(flat) - count + 1).values
    found = flat > bound
    equal = (flat == bound).nonzero().squeeze(1)
    found[equal[: count - int(found.sum())]] = True
    return found.view_as(values)


def movement(weight: Tensor, grad: Tensor) -> Tensor:
    """Return what a step adds to the saliency of each value: positive where it leaves zero.

    Sanh et al. 2020 (arXiv 2005.07683): -w dL/dw, summed over steps.

    Args:
        weight: Any shape, float.
        grad: Of the loss with respect to it.
    """
    return -weight * grad


def decayed(weight: Tensor, rate: float, period: int) -> Tensor:
    """Return a weight that has decayed by this rate in so many steps."""
    return weight * (1 - rate) ** period
