"""Weights of one format as one: what their codecs share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core import grouping
from qtool.core.packing import pack_bits, unpack_bits
from qtool.errors import SchemeError
from qtool.scheme import Shape2D, WeightScheme

DIMS = ("out_features", "in_features")


def refuse_keys(scheme: WeightScheme) -> None:
    """Refuse a scheme with what only single formats have.

    Raises:
        SchemeError: it has classes of rows, or its planes are encoded.
    """
    if scheme.code:
        raise SchemeError(
            f"Planes of this format are stored as they are; code is {scheme.code}. Formats "
            "encrypted_planes and sparse_planes hold such a weight."
        )
    if scheme.rows:
        raise SchemeError(
            f"All rows of this format have the same bits; rows is {scheme.rows}. Format mixed_rows "
            "holds such a weight."
        )


def joined(tensors: Sequence[QuantizedTensor], dim: int) -> Shape2D:
    """Return the shape of weights below one another (dim 0), or beside one another.

    Raises:
        SchemeError: they differ in more than their length, or a group would run on.
    """
    first, other = tensors[0], 1 - dim
    for each in tensors[1:]:
        if each.scheme != first.scheme or each.shape[other] != first.shape[other]:
            raise SchemeError(
                f"Weights of {first.scheme}, {tuple(first.shape)} and of {each.scheme}, "
                f"{tuple(each.shape)} don't make one. Leave them apart."
            )
    size, before = first.scheme.group_size, tensors[:-1]
    grouped = DIMS[dim] == first.scheme.group_dim
    if grouped and before and (not size or any(each.shape[dim] % size for each in before)):
        raise SchemeError(
            f"Groups of {size or 'all'} {DIMS[dim]} would go on from one weight to the next. "
            "Only the last may end within a group."
        )
    length = sum(tensor.shape[dim] for tensor in tensors)
    return first.shape._replace(**{DIMS[dim]: length})


def cat_planes(tensors: Sequence[QuantizedTensor], name: str, dim: int) -> Tensor:
    """Return the planes of weights, packed along in_features, as those of one."""
    if dim == 0:
        return torch.cat([tensor.parts[name] for tensor in tensors], dim=-2)
    bits = [unpack_bits(tensor.parts[name], tensor.shape.in_features) for tensor in tensors]
    return pack_bits(torch.cat(bits, dim=-1))


def narrowed(
    tensor: QuantizedTensor, dim: int, start: int, length: int, *, check_groups: bool = True
) -> Shape2D:
    """Return the shape of rows (dim 0) or columns of a weight, from `start` on.

    The last group of a weight may be short, and so the part may end anywhere.

    Args:
        tensor: The weight.
        dim: 0 or 1.
        start: Of the part.
        length: Of the part.
        check_groups: Where inputs are sorted, groups aren't of neighbours.

    Raises:
        SchemeError: the weight has no such part, or the part begins within a group and leaves it.
    """
    scheme, shape, name = tensor.scheme, tensor.shape, DIMS[dim]
    if start < 0 or length < 1 or start + length > shape[dim]:
        raise SchemeError(
            f"A weight of {shape[dim]} {name} has no part {start} to {start + length}."
        )
    if check_groups and name == scheme.group_dim:
        refuse_cut(name, scheme.group_size or shape[dim], start, length)
    return shape._replace(**{name: length})


def refuse_cut(name: str, size: int, start: int, length: int) -> None:
    """Refuse a part that begins within a group of `size` and leaves it."""
    if start % size and start % size + length > size:
        raise SchemeError(
            f"{name} {start} to {start + length} begin within a group of {size}. A part has to "
            "begin with a group, or to lie within one."
        )


def narrow_planes(planes: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Return a part of planes (bits, out_features, words), packed along in_features."""
    if dim == 0:
        return planes.narrow(-2, start, length).contiguous()
    return pack_bits(unpack_bits(planes, start + length)[..., start:])


def narrow_parameters(
    parameters: Tensor, tensor: QuantizedTensor, dim: int, start: int, length: int
) -> Tensor:
    """Return what a part of a weight has of parameters, stored as `grouping.spread` takes them."""
    if DIMS[dim] == tensor.scheme.group_dim:
        size = tensor.scheme.group_size or tensor.shape[dim]
        start, end = start // size, -(-(start + length) // size)
        length = end - start
    return parameters.narrow(dim - 2, start, length).contiguous()


def codes_in_groups(codes: Tensor, scheme: WeightScheme) -> Tensor:
    """Cut codes (out_features, in_features) into rows of groups (rows, num_groups, group_size)."""
    return grouping.split(grouping.to_rows(codes, scheme), scheme.group_size).contiguous()
