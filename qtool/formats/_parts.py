"""Parts of weights cut and joined: planes packed along in_features, and parameters of groups.

Dimension 0 is out_features, dimension 1 in_features, in parts counted from the end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.packing import pack_bits, unpack_bits
from qtool.errors import SchemeError
from qtool.scheme import Shape2D, WeightScheme

DIMS = ("out_features", "in_features")


def narrowed(shape: Shape2D, dim: int, length: int) -> Shape2D:
    """Return the shape of a part of a weight."""
    return Shape2D(length, shape.in_features) if dim == 0 else Shape2D(shape.out_features, length)


def narrow_planes(planes: Tensor, inputs: int, dim: int, start: int, length: int) -> Tensor:
    """Return some rows or columns of planes (..., out_features, words) int32 of `inputs` bits."""
    if dim == 0:
        return planes.narrow(-2, start, length).contiguous()
    return pack_bits(unpack_bits(planes, inputs).narrow(-1, start, length))


def narrow_groups(
    parameters: Tensor, scheme: WeightScheme, shape: Shape2D, dim: int, start: int, length: int
) -> Tensor:
    """Return the parameters of some rows or columns.

    Raises:
        SchemeError: a group would be cut in two.
    """
    if DIMS[dim] == scheme.group_dim:
        size = min(scheme.group_size or shape[dim], shape[dim])
        first, stop = start // size, -(-(start + length) // size)
        if start % size != 0 and stop - first > 1:
            raise SchemeError(
                f"A part that begins at {start} cuts a group of {size} {scheme.group_dim}. Begin "
                f"at a multiple of {size}."
            )
        start, length = first, stop - first
    return parameters.narrow(dim - 2, start, length).contiguous()


def joined(tensors: Sequence[QuantizedTensor], dim: int) -> Shape2D:
    """Return the shape of weights beside one another, whose groups stay what they are.

    Raises:
        SchemeError: they differ in more than their length, or groups would.
    """
    first, *rest = tensors
    for other in rest:
        if other.scheme != first.scheme or other.shape[1 - dim] != first.shape[1 - dim]:
            raise SchemeError(
                f"Weights of {first.scheme}, {tuple(first.shape)} and of {other.scheme}, "
                f"{tuple(other.shape)} don't make one. Leave them apart."
            )
    size, grouped = first.scheme.group_size, DIMS[dim] == first.scheme.group_dim
    if grouped and rest and (not size or any(each.shape[dim] % size for each in tensors[:-1])):
        raise SchemeError(
            f"Groups of {size or 'all'} {DIMS[dim]} would go on from one weight to the next. "
            "Only the last may end within a group."
        )
    return narrowed(first.shape, dim, sum(tensor.shape[dim] for tensor in tensors))


def cat_planes(planes: Sequence[Tensor], inputs: Sequence[int], dim: int) -> Tensor:
    """Return planes (..., out_features, words) int32 below, or beside, one another."""
    if dim == 0:
        return torch.cat([*planes], dim=-2)
    bits = [unpack_bits(part, length) for part, length in zip(planes, inputs, strict=True)]
    return pack_bits(torch.cat(bits, dim=-1))
