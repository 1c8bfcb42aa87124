"""Codes, scales and zero points of peers <-> weights of format `affine`, to the bit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.core.packing import codes_to_planes, planes_to_codes
from qtool.errors import CheckpointError
from qtool.exchange import LayerPlace
from qtool.formats.affine import AFFINE, packed_affine, zero_points
from qtool.formats.ordered_affine import ORDERED_AFFINE, encode_ordered, split_order
from qtool.scheme import Shape2D, WeightScheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignGrid:
    """A weight as peers have it: scale * (code - zero point), groups along in_features."""

    codes: Tensor
    """(out_features, in_features) uint8."""
    scales: Tensor
    """(out_features, num_groups) in a float dtype."""
    zeros: Tensor
    """(out_features, num_groups) uint8."""
    num_bits: int
    group_size: int | None
    """None: a row is one group."""
    order: Tensor | None = None
    """(in_features,) int64, which input each column has; None: they are as they come."""

    def to_tensor(self, where: str) -> QuantizedTensor:
        """Return the same weight as one of ours; `where` is for messages.

        A scale below zero, as AutoRound writes them, becomes the positive one of mirrored codes.

        Raises:
            CheckpointError: a scale isn't finite, or is no float16 number.
        """
        codes, zeros, top = self.codes, self.zeros, 2**self.num_bits - 1
        scales = exact_half(self.scales, where)
        negative = scales < 0
        if bool(negative.any()):
            columns = torch.arange(codes.shape[1]) // (self.group_size or codes.shape[1])
            codes = torch.where(negative[:, columns], top - codes, codes)
            zeros, scales = torch.where(negative, top - zeros, zeros), scales.abs()
        middle = 2 ** (self.num_bits - 1)
        scheme = WeightScheme(
            num_bits=self.num_bits,
            group_size=self.group_size,
            symmetric=self.num_bits > 1 and bool((zeros == middle).all()),
        )
        planes = codes_to_planes(codes, self.num_bits)
        plain = packed_affine(planes, scales, zeros, scheme, Shape2D(*codes.shape))
        return plain if self.order is None else encode_ordered(plain, self.order)


def foreign_grid(tensor: QuantizedTensor) -> ForeignGrid:
    """Return a weight of format `affine` or `ordered_affine` as peers have it."""
    order = None
    if tensor.format == ORDERED_AFFINE:
        tensor, order = split_order(tensor)
    return ForeignGrid(
        codes=planes_to_codes(tensor.parts["codes"], tensor.shape.in_features),
        scales=tensor.parts["scales"],
        zeros=zero_points(tensor),
        num_bits=tensor.scheme.num_bits,
        group_size=tensor.scheme.group_size,
        order=order,
    )


def why_not_affine(entry: LayerEntry, place: LayerPlace, *, ordered: bool) -> str | None:
    """Return why a layer isn't a linear of affine codes with groups along its inputs, or None."""
    if place == "embedding" or entry.shared_with is not None:
        return "it is an embedding or shares the parts of one, and only linears are meant"
    formats = (AFFINE, ORDERED_AFFINE) if ordered else (AFFINE,)
    if entry.format not in formats:
        return (
            f"it is stored as {entry.format}, and {AFFINE} is meant, as the methods rtn and gptq "
            "write it"
        )
    if entry.scheme.group_dim != "in_features":
        return "its groups run along out_features, and in_features is meant"
    return None


def exact_half(values: Tensor, where: str) -> Tensor:
    """Return scales in float16.

    Raises:
        CheckpointError: one isn't finite, or isn't a float16 number.
    """
    half = values.to(torch.float16)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{where} holds NaN or infinity. Copy the model again.")
    inexact = int((half.to(values.dtype) != values).sum())
    if inexact:
        raise CheckpointError(
            f"{where}: {inexact} of {values.numel()} {str(values.dtype)[6:]} values are no "
            "float16 numbers, in which qtool stores scales, and would be rounded."
        )
    return half
