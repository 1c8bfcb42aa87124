"""Views of the groups of a weight, along either dimension.

Solvers work on *rows of groups*, (rows, num_groups, group_size), whatever the group dimension:
for `in_features` a row is an output channel, for `out_features` it is an input channel. Group
parameters are (rows, num_groups) while solving, and stored with the in_features dimension last.
"""

import torch
from torch import Tensor

from qtool.scheme import Shape2D, WeightScheme


def to_rows(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the weight with groups running along its last dimension."""
    return weight if scheme.group_dim == "in_features" else weight.T


def split(rows: Tensor, group_size: int | None) -> Tensor:
    """Cut rows into groups, padded with zeros: (..., n) -> (..., num_groups, group_size).

    A `group_size` of None is n.
    """
    size = group_size or rows.shape[-1]
    padding = -rows.shape[-1] % size
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    return rows.unflatten(-1, (-1, size))


def join(groups: Tensor, length: int) -> Tensor:
    """Invert `split`: (..., num_groups, group_size) -> (..., length)."""
    return groups.flatten(-2)[..., :length]


def valid(length: int, group_size: int | None, device: torch.device) -> Tensor:
    """Return which elements of the groups are real, not padding: (num_groups, group_size) bool."""
    return split(torch.ones(length, dtype=torch.uint8, device=device), group_size).bool()


def spread(parameters: Tensor, scheme: WeightScheme, shape: Shape2D) -> Tensor:
    """Repeat stored group parameters so that each weight has its own.

    Args:
        parameters: (..., out_features, num_groups), or (..., num_groups, in_features) where
            groups run along out_features.
        scheme: Grouping of the weight.
        shape: Shape of the weight.

    Returns:
        (..., out_features, in_features).
    """
    length = scheme.grouped_length(shape)
    size = min(scheme.group_size or length, length)
    dim = -1 if scheme.group_dim == "in_features" else -2
    return parameters.repeat_interleave(size, dim=dim).narrow(dim, 0, length)


def to_stored(parameters: Tensor, scheme: WeightScheme) -> Tensor:
    """Bring (..., rows, num_groups) parameters to their stored layout, or back."""
    if scheme.group_dim == "in_features":
        return parameters.contiguous()
    return parameters.transpose(-1, -2).contiguous()
