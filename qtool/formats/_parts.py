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


def refuse_classes(scheme: WeightScheme) -> None:
    """Refuse a scheme whose rows have bits of their own.

    Raises:
        SchemeError: it has classes of rows.
    """
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


def codes_in_groups(codes: Tensor, scheme: WeightScheme) -> Tensor:
    """Cut codes (out_features, in_features) into rows of groups (rows, num_groups, group_size)."""
    return grouping.split(grouping.to_rows(codes, scheme), scheme.group_size).contiguous()
