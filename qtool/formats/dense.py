"""Format `dense`: the weight itself in float16, for layers that a recipe leaves alone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.scheme import Shape2D, WeightScheme

FORMAT = "dense"


def layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the one part, `weight`; the scheme has no influence."""
    del scheme
    return {"weight": PartSpec("float16", tuple(shape))}


def encode(weight: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Wrap a weight (out_features, in_features)."""
    parts = {"weight": weight.to(torch.float16).contiguous()}
    return QuantizedTensor(FORMAT, scheme, Shape2D(*weight.shape), parts)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    return tensor.parts["weight"].to(dtype)


CODEC = Codec(version=1, layout=layout, dequantize=dequantize)
