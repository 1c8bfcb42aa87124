"""Blocks of GGUF, bytes <-> codes and parameters, and what weight of ours they are.

Layouts as in ggml/src/ggml-common.h and ggml-quants.c of llama.cpp: a block is a part of a row.
What its weights are is kept to the bit: Q4_0, Q5_0 and Q8_0 are `affine`, Q4_1 and Q5_1 `minima`,
k-quants `nested`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.packing import codes_to_planes
from qtool.errors import CheckpointError
from qtool.exchange._gguf_file import GgmlType
from qtool.formats import affine
from qtool.formats.affine import packed_affine
from qtool.formats.minima import encode_minima
from qtool.formats.nested import encode_nested
from qtool.scheme import Shape2D, WeightScheme

LEGACY_SIZE, K_QUANT_SIZE = 32, 256
DECODED_AT_ONCE = 2**22
"""While a block is taken apart, a weight takes some ten bytes."""
Blocks = Tensor
"""(rows, blocks of a row, bytes of a block) uint8."""


def _half(octets: Tensor) -> Tensor:
    """Return two bytes as a float16: (rows, blocks, 2) -> (rows, blocks)."""
    return octets.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(octets: Tensor) -> Tensor:
    """Return the lower halves of bytes, then the upper ones: (..., n) -> (..., 2 n)."""
    return torch.cat([octets & 15, octets >> 4], -1)


def _bits(octets: Tensor) -> Tensor:
    """Return bits, the lowest of the first byte first: (..., n) -> (..., 8 n)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((octets.unsqueeze(-1) >> shifts) & 1).flatten(-2)


def _fields(octets: Tensor, width: int, run: int) -> Tensor:
    """Return fields of `width` bits: those of one place of all bytes of a run, then of the next.

    (..., n) -> (..., n * 8 / width), as k-quants pack what is wider or narrower than a byte.
    """
    runs = octets.unflatten(-1, (-1, 1, run))  # (..., runs, 1, run)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).unsqueeze(-1)
    return ((runs >> shifts) & (2**width - 1)).flatten(-3)


def _finite(*parameters: Tensor) -> None:
    if not all(bool(each.isfinite().all()) for each in parameters):
        raise CheckpointError("a scale isn't finite")


def _affine(codes: Tensor, scales: Tensor, num_bits: int) -> QuantizedTensor:
    """Return scale * (code - 2^(num_bits - 1)), the scale of any sign, as an affine weight.

    Where the scale is negative, codes count from the other end, and the zero point is one less;
    where it is 0, all weights are.
    """
    _finite(scales)
    rows, groups = scales.shape
    middle, top = 2 ** (num_bits - 1), 2**num_bits - 1
    falls, none = scales < 0, scales == 0
    codes = torch.where(falls.unsqueeze(-1), top - codes, codes)
    codes = torch.where(none.unsqueeze(-1), middle, codes)
    scheme = WeightScheme(
        num_bits=num_bits, group_size=LEGACY_SIZE, symmetric=not bool(falls.any())
    )
    shape = Shape2D(rows, groups * LEGACY_SIZE)
    planes = codes_to_planes(codes.to(torch.uint8).flatten(1), num_bits)
    zeros = torch.where(falls, middle - 1, middle).to(torch.uint8)
    return packed_affine(planes, scales.abs().masked_fill(none, 1.0), zeros, scheme, shape)


def _minima(codes: Tensor, scales: Tensor, minima: Tensor, num_bits: int) -> QuantizedTensor:
    """Return minimum + scale * code."""
    _finite(scales, minima)
    scheme = WeightScheme(num_bits=num_bits, group_size=LEGACY_SIZE)
    return encode_minima(codes.flatten(1), scales, minima, scheme)


def _q4_0(blocks: Blocks) -> QuantizedTensor:
    return _affine(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]), 4)


def _q4_1(blocks: Blocks) -> QuantizedTensor:
    return _minima(_nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]), 4)


def _q5_0(blocks: Blocks) -> QuantizedTensor:
    codes = _nibbles(blocks[..., 6:]) | (_bits(blocks[..., 2:6]) << 4)
    return _affine(codes, _half(blocks[..., :2]), 5)


def _q5_1(blocks: Blocks) -> QuantizedTensor:
    codes = _nibbles(blocks[..., 8:]) | (_bits(blocks[..., 4:8]) << 4)
    return _minima(codes, _half(blocks[..., :2]), _half(blocks[..., 2:4]), 5)


def _q8_0(blocks: Blocks) -> QuantizedTensor:
    return _affine(blocks[..., 2:] ^ 128, _half(blocks[..., :2]), 8)  # two's complement + 128


def _nested(
    codes: Tensor,
    scales: tuple[Tensor, Tensor],
    minima: tuple[Tensor, Tensor] | None,
    num_bits: int,
) -> QuantizedTensor:
    """Return a k-quant: all arguments (rows, blocks, ...), super-scales (rows, blocks)."""
    _finite(scales[1], *(minima[1:] if minima else ()))
    scheme = WeightScheme(
        num_bits=num_bits,
        group_size=K_QUANT_SIZE // scales[0].shape[-1],
        symmetric=minima is None,
    )
    flat = (scales[0].flatten(1), scales[1])
    lowest = (minima[0].flatten(1), minima[1]) if minima else None
    return encode_nested(codes.flatten(1), flat, lowest, scheme)


def _q2_k(blocks: Blocks) -> QuantizedTensor:
    both, codes = blocks[..., :16], _fields(blocks[..., 16:80], 2, 32)
    scales = both & 15, _half(blocks[..., 80:82])
    return _nested(codes, scales, (both >> 4, _half(blocks[..., 82:84])), 2)


def _q3_k(blocks: Blocks) -> QuantizedTensor:
    upper = _fields(blocks[..., :32], 1, 32)
    codes = _fields(blocks[..., 32:96], 2, 32) | (upper << 2)
    lower, high = _nibbles(blocks[..., 96:104]), _fields(blocks[..., 104:108], 2, 4)
    return _nested(codes, (lower | (high << 4), _half(blocks[..., 108:110])), None, 3)


def _six_bit_pairs(octets: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight scale codes and eight minimum codes of six bits out of twelve bytes."""
    first, second, rest = octets.split(4, -1)
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], -1)
    return scales, torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], -1)


def _q4_k(blocks: Blocks) -> QuantizedTensor:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    whole = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    codes = _fields(blocks[..., 16:], 4, 32)
    return _nested(codes, (scales, whole[0]), (minima, whole[1]), 4)


def _q5_k(blocks: Blocks) -> QuantizedTensor:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    whole = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    codes = _fields(blocks[..., 48:], 4, 32) | (_fields(blocks[..., 16:48], 1, 32) << 4)
    return _nested(codes, (scales, whole[0]), (minima, whole[1]), 5)


def _q6_k(blocks: Blocks) -> QuantizedTensor:
    upper = _fields(blocks[..., 128:192], 2, 32)
    codes = _fields(blocks[..., :128], 4, 64) | (upper << 4)
    scales = blocks[..., 192:208] ^ 128, _half(blocks[..., 208:210])
    return _nested(codes, scales, None, 6)


DECODERS: Mapping[str, Callable[[Blocks], QuantizedTensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""(rows, blocks of a row, bytes of a block) uint8 -> the weight, to the bit, by the type's name."""


def decode_blocks(rows: Tensor, kind: GgmlType) -> QuantizedTensor:
    """Return the weight whose blocks these are, to the bit.

    Args:
        rows: (out_features, bytes of a row) uint8.
        kind: A type of blocks.

    Raises:
        CheckpointError: a scale isn't finite; the message doesn't say of which tensor.
    """
    blocks = rows.unflatten(1, (-1, kind.block_bytes))
    at_once = max(1, DECODED_AT_ONCE // (blocks.shape[1] * kind.block_size) // 32) * 32
    parts = [DECODERS[kind.name](chunk) for chunk in blocks.split(at_once)]
    if len({part.scheme for part in parts}) > 1:  # some have scales of one sign alone
        parts = [_with_zero_points(part) for part in parts]
    return codec(parts[0].format).cat(parts, 0) if len(parts) > 1 else parts[0]


def _with_zero_points(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return an affine weight with zero points, whether it needs them or not."""
    scheme, parts = replace(tensor.scheme, symmetric=False), tensor.parts
    zeros = affine.zero_points(tensor)
    return packed_affine(parts["codes"], parts["scales"], zeros, scheme, tensor.shape)
