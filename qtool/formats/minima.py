"""Format `minima`: w = minimum + scale * code. Specified in docs/format.md, section 15.

As an affine weight whose zero point needn't be a whole number, nor lie among the codes: what GGUF's
Q4_1 and Q5_1 are.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.core.packing import codes_to_planes, num_words
from qtool.formats import _steps
from qtool.formats._parts import (
    cat_planes,
    joined,
    narrow_parameters,
    narrow_planes,
    narrowed,
    refuse_keys,
)
from qtool.scheme import Shape2D, WeightScheme

MINIMA = "minima"


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: codes, scales and, unless symmetric, minima."""
    refuse_keys(scheme)
    bits, parameters = scheme.num_bits, scheme.parameter_shape(shape)
    parts = {
        "codes": PartSpec("int32", (bits, shape.out_features, num_words(shape.in_features))),
        "scales": PartSpec("float16", parameters),
    }
    if not scheme.symmetric:
        parts["minima"] = PartSpec("float16", parameters)
    return parts


def encode_minima(
    codes: Tensor, scales: Tensor, minima: Tensor, scheme: WeightScheme
) -> QuantizedTensor:
    """Pack a weight that isn't symmetric.

    Args:
        codes: (out_features, in_features) uint8.
        scales: Float16 in the stored shape of group parameters.
        minima: Likewise.
        scheme: Bits and grouping.
    """
    planes = codes_to_planes(codes, scheme.num_bits)
    parts = {"codes": planes, "scales": scales.contiguous(), "minima": minima.contiguous()}
    return QuantizedTensor(MINIMA, scheme, Shape2D(*codes.shape), parts)


def _parameters(tensor: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return steps and minima in their stored shape."""
    steps = tensor.parts["scales"].to(dtype)
    if tensor.scheme.symmetric:
        return steps, _steps.symmetric_minima(steps, tensor.scheme.num_bits)
    return steps, tensor.parts["minima"].to(dtype)


def minima_to_binary(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight as a binary-coded one with float32 parameters, offsets rounded."""
    return _steps.stepped_to_binary(tensor, _parameters)


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`, rounded once from float32."""
    return _steps.stepped_dequantize(tensor, dtype, _parameters)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another."""
    shape, parts = joined(tensors, dim), {"codes": cat_planes(tensors, "codes", dim)}
    for name in tensors[0].parts.keys() - parts.keys():
        parts[name] = torch.cat([tensor.parts[name] for tensor in tensors], dim)
    return QuantizedTensor(MINIMA, tensors[0].scheme, shape, parts)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns."""
    shape = narrowed(tensor, dim, start, length)
    parts = {"codes": narrow_planes(tensor.parts["codes"], dim, start, length)}
    for name in tensor.parts.keys() - parts.keys():
        parts[name] = narrow_parameters(tensor.parts[name], tensor, dim, start, length)
    return QuantizedTensor(MINIMA, tensor.scheme, shape, parts)


CODEC = Codec(version=1, layout=_layout, dequantize=_dequantize, cat=_cat, narrow=_narrow)
