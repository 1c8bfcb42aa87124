"""Weights of ours as blocks of GGUF, to the bit, or why not: the inverse of `decode_blocks`.

An affine weight is scale * (code - zero_point), and several types hold that whole number: the
smallest that holds all that a scheme allows is taken, so that scheme and shape alone decide. Where
groups are of whole 256, a k-quant's scale code is 1 and its minimum code the zero point.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.core import grouping
from qtool.core.packing import planes_to_codes
from qtool.errors import CheckpointError
from qtool.exchange._gguf_blocks import K_QUANT_SIZE, LEGACY_SIZE
from qtool.formats import affine, minima, nested
from qtool.scheme import Shape2D, WeightScheme

NESTED_TYPES = {
    (2, 16, False): "Q2_K",
    (3, 16, True): "Q3_K",
    (4, 32, False): "Q4_K",
    (5, 32, False): "Q5_K",
    (6, 16, True): "Q6_K",
}
"""Of `nested` weights, by bits, group size, and whether they are symmetric."""
MINIMA_TYPES = ((4, "Q4_1"), (5, "Q5_1"))


@dataclass(frozen=True, slots=True)
class AffineType:
    """A type of blocks that holds affine weights."""

    name: str
    num_bits: int
    multiple: int
    """Groups and rows are of whole multiples of it."""
    raised: bool
    """It stores code and zero point; otherwise their difference alone."""

    def takes(self, scheme: WeightScheme, shape: Shape2D) -> bool:
        """Return whether it holds every weight of a scheme."""
        whole = not any(size % self.multiple for size in _sizes(scheme, shape))
        needed = scheme.num_bits + (not self.raised and not scheme.symmetric)
        return whole and needed <= self.num_bits


AFFINE_TYPES = (
    AffineType("Q2_K", 2, K_QUANT_SIZE, raised=True),
    AffineType("Q3_K", 3, K_QUANT_SIZE, raised=False),
    AffineType("Q4_0", 4, LEGACY_SIZE, raised=False),
    AffineType("Q4_K", 4, K_QUANT_SIZE, raised=True),
    AffineType("Q5_0", 5, LEGACY_SIZE, raised=False),
    AffineType("Q5_K", 5, K_QUANT_SIZE, raised=True),
    AffineType("Q6_K", 6, K_QUANT_SIZE, raised=False),
    AffineType("Q8_0", 8, LEGACY_SIZE, raised=False),
)
"""The smallest first."""


def _sizes(scheme: WeightScheme, shape: Shape2D) -> tuple[int, ...]:
    """Return what must be of whole blocks: rows, and groups where a row has several."""
    size, length = scheme.group_size, shape.in_features
    return (length,) if size is None or size >= length else (length, size)


def why_no_type(entry: LayerEntry) -> str | None:  # noqa: PLR0911 - a reason each
    """Return why a layer has no type of blocks, as a clause; None: it has one."""
    if entry.activation is not None:
        return "its inputs are quantized while it runs, which GGUF can't say"
    if entry.scheme.group_dim != "in_features":
        return "its groups run along out_features, and blocks along in_features"
    if any(size % LEGACY_SIZE for size in _sizes(entry.scheme, entry.shape)):
        if entry.format == nested.NESTED and _type_name(entry) is not None:
            return None
        size = entry.scheme.group_size or entry.shape.in_features
        return (
            f"it has {entry.shape.in_features} inputs in groups of {size}, and both must be "
            f"multiples of {LEGACY_SIZE}"
        )
    if _type_name(entry) is not None:
        return None
    if entry.format == affine.AFFINE:
        return (
            f"no type of GGUF holds {entry.scheme.num_bits} bits with zero points; 8 bits must be "
            "symmetric, 7 bits needn't"
        )
    formats = affine.AFFINE, minima.MINIMA, nested.NESTED
    return (
        f"GGUF has no {entry.format} weights of {entry.scheme.num_bits} bits; it has equal steps, "
        f"as formats {', '.join(formats)} have: methods rtn and gptq make them"
    )


def type_of(entry: LayerEntry) -> str:
    """Return the name of the type of blocks that holds a layer; `why_no_type` has been asked."""
    name = _type_name(entry)
    if name is None:
        raise CheckpointError(f"No type of GGUF holds a weight of {entry.scheme}.")
    return name


def type_without_zero_points(tensor: QuantizedTensor) -> str | None:
    """Return the type of blocks without zero points that holds an affine weight with them.

    Where a zero point is one below the middle, as in Q4_0 with a scale below zero, codes count
    from the other end. None: another zero point occurs, or the weight isn't affine.
    """
    scheme = tensor.scheme
    if tensor.format != affine.AFFINE or any(
        size % LEGACY_SIZE for size in _sizes(scheme, tensor.shape)
    ):
        return None
    middle = 2 ** (scheme.num_bits - 1)
    zeros = affine.zero_points(tensor)
    if not bool(((zeros == middle) | (zeros == middle - 1)).all()):
        return None
    alike = (
        each.name
        for each in AFFINE_TYPES
        if each.num_bits == scheme.num_bits and not each.raised and each.multiple == LEGACY_SIZE
    )
    return next(alike, None)


def _type_name(entry: LayerEntry) -> str | None:
    scheme, shape = entry.scheme, entry.shape
    if entry.format == nested.NESTED:
        name = NESTED_TYPES.get((scheme.num_bits, scheme.group_size or 0, scheme.symmetric))
        return None if shape.in_features % K_QUANT_SIZE else name
    if entry.format == minima.MINIMA and not scheme.symmetric:
        return next((name for bits, name in MINIMA_TYPES if scheme.num_bits <= bits), None)
    if entry.format == affine.AFFINE:
        return next((each.name for each in AFFINE_TYPES if each.takes(scheme, shape)), None)
    return None


def encode(tensor: QuantizedTensor, name: str) -> Tensor:
    """Return the rows of a weight as blocks of a type: (out_features, bytes of a row) uint8.

    Args:
        tensor: A weight whose entry `type_of` has given a name.
        name: That name.
    """
    if tensor.format == nested.NESTED:
        return _encode_nested(tensor, name)
    if tensor.format == minima.MINIMA:
        return _encode_minima(tensor, name)
    return _encode_affine(tensor, next(each for each in AFFINE_TYPES if each.name == name))


def _codes(tensor: QuantizedTensor, block: int) -> Tensor:
    """Return codes in blocks: (rows, blocks of a row, block) uint8."""
    return planes_to_codes(tensor.parts["codes"], tensor.shape.in_features).unflatten(
        1, (-1, block)
    )


def _per_block(parameters: Tensor, tensor: QuantizedTensor, block: int) -> Tensor:
    """Return of parameters of groups those of blocks: (rows, blocks of a row)."""
    return grouping.spread(parameters, tensor.scheme, tensor.shape)[:, ::block]


def _octets(half: Tensor) -> Tensor:
    """Return float16 as bytes: (rows, blocks) -> (rows, blocks, 2)."""
    return half.contiguous().unsqueeze(-1).view(torch.uint8)


def _joined(*parts: Tensor) -> Tensor:
    """Return the rows of blocks made of these parts, each (rows, blocks, bytes)."""
    return torch.cat(parts, -1).flatten(1)


def _paired(codes: Tensor) -> Tensor:
    """Return codes of four bits by two, those of the second half above: (..., 2 n) -> (..., n)."""
    low, high = codes.chunk(2, -1)
    return (low & 15) | ((high & 15) << 4)


def _packed_bits(bits: Tensor) -> Tensor:
    """Return zeros and ones as bytes, the first the lowest bit: (..., 8 n) -> (..., n)."""
    return _packed_fields(bits, 1, 1)


def _packed_fields(codes: Tensor, width: int, run: int) -> Tensor:
    """Return the inverse of `_fields`: (..., n * 8 / width) -> (..., n)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).unsqueeze(-1)
    fields = codes.unflatten(-1, (-1, 8 // width, run)) & (2**width - 1)
    return (fields << shifts).sum(-2, dtype=torch.uint8).flatten(-2)


def _encode_minima(tensor: QuantizedTensor, name: str) -> Tensor:
    codes = _codes(tensor, LEGACY_SIZE)
    halves = [
        _octets(_per_block(tensor.parts[part], tensor, LEGACY_SIZE))
        for part in ("scales", "minima")
    ]
    upper = [_packed_bits(codes >> 4)] if name == MINIMA_TYPES[1][1] else []
    return _joined(*halves, *upper, _paired(codes))


def _encode_affine(tensor: QuantizedTensor, kind: AffineType) -> Tensor:
    codes, block = _codes(tensor, kind.multiple), kind.multiple
    scales = _per_block(tensor.parts["scales"], tensor, block)
    zeros = _per_block(affine.zero_points(tensor), tensor, block)
    if kind.raised:
        groups = NUM_GROUPS[kind.name]
        one = torch.ones(*scales.shape, groups, dtype=torch.uint8)
        lowest = zeros.unsqueeze(-1).expand(-1, -1, groups)
        return SUPER_ENCODERS[kind.name](codes, (one, scales), (lowest, scales))
    middle = 2 ** (kind.num_bits - 1)
    if tensor.scheme.num_bits == kind.num_bits:
        falls = zeros == middle - 1
        codes = torch.where(falls.unsqueeze(-1), 2 * middle - 1 - codes, codes)
        scales, zeros = torch.where(falls, -scales, scales), zeros.masked_fill(falls, middle)
    raised = (codes.to(torch.int16) - zeros.unsqueeze(-1) + middle).to(torch.uint8)
    if block == K_QUANT_SIZE:
        groups = NUM_GROUPS[kind.name]
        one = torch.full((*scales.shape, groups), 1 + SCALE_MIDDLES[kind.name], dtype=torch.uint8)
        return SUPER_ENCODERS[kind.name](raised, (one, scales), None)
    upper = [_packed_bits(raised >> 4)] if kind.num_bits == 5 else []  # noqa: PLR2004 - Q5_0
    packed = raised ^ 128 if kind.num_bits == 8 else _paired(raised)  # noqa: PLR2004 - Q8_0
    return _joined(_octets(scales), *upper, packed)


def _encode_nested(tensor: QuantizedTensor, name: str) -> Tensor:
    parts, rows = tensor.parts, tensor.shape.out_features
    groups = NUM_GROUPS[name]

    def pair(coded: str, whole: str) -> CodedPair:
        return planes_to_codes(parts[coded], rows).T.unflatten(1, (-1, groups)), parts[whole]

    lowest = None if tensor.scheme.symmetric else pair("minimum_codes", "super_minima")
    scales = pair("scale_codes", "super_scales")
    return SUPER_ENCODERS[name](_codes(tensor, K_QUANT_SIZE), scales, lowest)


CodedPair = tuple[Tensor, Tensor]
"""Codes (rows, blocks, groups) uint8, and what they are multiples of, (rows, blocks) float16."""


def _q2_k(codes: Tensor, scales: CodedPair, lowest: CodedPair | None) -> Tensor:
    assert lowest is not None
    both = scales[0] | (lowest[0] << 4)
    return _joined(both, _packed_fields(codes, 2, 32), _octets(scales[1]), _octets(lowest[1]))


def _q3_k(codes: Tensor, scales: CodedPair, _lowest: CodedPair | None) -> Tensor:
    lower, upper = _paired(scales[0]), _packed_fields(scales[0] >> 4, 2, 4)
    high = _packed_fields(codes >> 2, 1, 32)
    return _joined(high, _packed_fields(codes, 2, 32), lower, upper, _octets(scales[1]))


def _six_bits(scales: Tensor, lowest: Tensor) -> Tensor:
    """Return eight scale codes and eight minimum codes in twelve bytes."""
    (first, later), (least, last) = scales.chunk(2, -1), lowest.chunk(2, -1)
    rest = (later & 15) | ((last & 15) << 4)
    return torch.cat([first | ((later >> 4) << 6), least | ((last >> 4) << 6), rest], -1)


def _q4_k(codes: Tensor, scales: CodedPair, lowest: CodedPair | None) -> Tensor:
    assert lowest is not None
    coded = _six_bits(scales[0], lowest[0])
    return _joined(_octets(scales[1]), _octets(lowest[1]), coded, _packed_fields(codes, 4, 32))


def _q5_k(codes: Tensor, scales: CodedPair, lowest: CodedPair | None) -> Tensor:
    assert lowest is not None
    coded, upper = _six_bits(scales[0], lowest[0]), _packed_fields(codes >> 4, 1, 32)
    halves = _octets(scales[1]), _octets(lowest[1])
    return _joined(*halves, coded, upper, _packed_fields(codes, 4, 32))


def _q6_k(codes: Tensor, scales: CodedPair, _lowest: CodedPair | None) -> Tensor:
    lower, upper = _packed_fields(codes, 4, 64), _packed_fields(codes >> 4, 2, 32)
    return _joined(lower, upper, scales[0] ^ 128, _octets(scales[1]))


NUM_GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16}
SCALE_MIDDLES = {"Q3_K": 32, "Q6_K": 128}
SUPER_ENCODERS: dict[str, Callable[[Tensor, CodedPair, CodedPair | None], Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
