"""Any weight as bit planes with scales and offsets: docs/format.md, section 10."""

import torch

import qtool.formats
from qtool import plugins
from qtool.base import Codec, QuantizedTensor
from qtool.errors import SchemeError
from qtool.formats.binary_coding import BINARY_CODING, encode_binary
from qtool.scheme import WeightScheme


def opened_weight(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a weight in the format in which backends run it: itself, unless it is encoded."""
    codec = plugins.load(qtool.formats, tensor.format, "CODEC", Codec)
    return tensor if codec.opened is None else codec.opened(tensor)


def in_planes(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a weight in binary coding: itself, or one that means the same to float16's rounding.

    Raises:
        SchemeError: its format doesn't say what its planes are.
    """
    tensor = opened_weight(tensor)
    if tensor.format == BINARY_CODING:
        return tensor
    codec = plugins.load(qtool.formats, tensor.format, "CODEC", Codec)
    trainable, old = codec.trainable, tensor.scheme
    if trainable is None:
        raise SchemeError(
            f"Weights of format {tensor.format} have no scales that an adapter could replace. Use "
            "low-rank adapters (lora, ra-lora), or a checkpoint of another method."
        )
    start = trainable(tensor)
    scales, offsets = (each.to(torch.float16) for each in start.planes(start.parameters))
    scheme = WeightScheme(num_bits=old.num_bits, group_size=old.group_size, group_dim=old.group_dim)
    return encode_binary(start.codes, scales.permute(1, 2, 0), offsets, scheme, tensor.shape)
