"""Format `sparse_planes`: planes of pruned weights, in about the bits that are left of them.

docs/format.md, section 19; sequential encryption (arXiv 2105.01869). When a model is loaded two
planes of `binary_coding` become of each: where a weight is zero they have unlike signs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.core import sequential_code
from qtool.core.packing import WORD_BITS, num_words, pack_bits, unpack_bits
from qtool.core.place_codes import decode_places, encode_places, place_widths
from qtool.core.xor_networks import pack_network, unpack_network
from qtool.errors import SchemeError
from qtool.formats import binary_coding
from qtool.formats._parts import narrowed, refuse_keys
from qtool.scheme import MAX_BITS, BitCode, Shape2D, WeightScheme

SPARSE_PLANES = "sparse_planes"
MOST_PLANES = MAX_BITS // 2


def _code(scheme: WeightScheme, shape: Shape2D) -> BitCode:
    """Return how bits are encoded.

    Raises:
        SchemeError: the format doesn't hold such a weight.
    """
    code, numel = scheme.code, shape.out_features * shape.in_features
    if code is None or not 1 <= code.kept <= numel or code.registers < 1:
        raise SchemeError(
            f"The code of sparse planes is {code}; registers and 1 to {numel} kept weights are "
            "meant, of these {out_features} by {in_features}.".format(**shape._asdict())
        )
    if code.corrections > scheme.num_bits * code.kept:
        raise SchemeError(
            f"{code.corrections} corrections are more than the {scheme.num_bits * code.kept} bits "
            "of the weights that are kept."
        )
    if not scheme.symmetric or scheme.num_bits > MOST_PLANES:
        raise SchemeError(
            f"Sparse planes are symmetric and {MOST_PLANES} at most (where a weight is zero there "
            f"is no offset, and each becomes two), and {scheme.num_bits} bits are asked for, "
            f"symmetric={str(scheme.symmetric).lower()}. Give --set weights.scheme.symmetric=true, "
            f"and 1 to {MOST_PLANES} bits."
        )
    return code


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight."""
    refuse_keys(scheme.plain())
    code, numel = _code(scheme, shape), shape.out_features * shape.in_features
    steps = sequential_code.num_steps(scheme.num_bits * num_words(numel), code.num_outputs)
    network = (code.registers + 1, code.num_outputs, num_words(code.num_inputs))
    parts = {
        "code_words": PartSpec("int32", (code.num_inputs, steps)),
        "xor_network": PartSpec("int32", network),
        "kept_weights": PartSpec(
            "int32", (1, num_words(numel)), counts=(numel - code.kept, code.kept)
        ),
    }
    if code.corrections:
        low, highest = place_widths(code.corrections, scheme.num_bits * code.kept)
        counts = (highest - 1, code.corrections)
        parts["correction_places"] = PartSpec("int32", (1, num_words(sum(counts))), counts=counts)
        if low:
            parts["correction_lows"] = PartSpec("int32", (low, num_words(code.corrections)))
    scales = binary_coding.CODEC.layout(scheme.plain(), shape)["plane_scales"]
    return {**parts, "plane_scales": scales}


def encode_sparse(
    planes: Tensor,
    kept: Tensor,
    scales: Tensor,
    network: Tensor,
    scheme: WeightScheme,
) -> QuantizedTensor:
    """Search for the code words of planes, and note the bits that they don't give.

    Args:
        planes: (num_bits, out_features, in_features) uint8, 0 or 1: the signs.
        kept: (out_features, in_features) bool, at least one; all other weights are zero.
        scales: Half the plane scales, as `binary_coding` stores them: >= 0 and descending.
        network: As `core.sequential_code.serial_network` gives it.
        scheme: Symmetric; its code says what the network takes and gives.

    Raises:
        SchemeError: the format doesn't hold such a weight.
    """
    shape = Shape2D(*kept.shape)
    assert scheme.code is not None
    wanted = pack_bits(planes.flatten(1))
    cares = pack_bits(kept.flatten()).expand_as(wanted)
    words = sequential_code.encoded(
        wanted.flatten(), cares.flatten(), network, scheme.code.num_inputs
    )
    given = sequential_code.decoded(words, network).flatten()[: wanted.numel()].view_as(wanted)
    wrong = unpack_bits(given ^ wanted, kept.numel())[:, kept.flatten()].flatten()
    places = wrong.nonzero().squeeze(1)
    code = scheme.code.with_found(int(kept.sum()), len(places))
    parts = {
        "code_words": words,
        "xor_network": pack_network(network.unflatten(1, (-1, len(words))).transpose(0, 1)),
        "kept_weights": pack_bits(kept.flatten()[None]),
        "plane_scales": scales.contiguous(),
    }
    if code.corrections:
        lows, unary = encode_places(places, len(wrong))
        parts["correction_places"] = unary[None]
        if len(lows):
            parts["correction_lows"] = lows
    tensor = QuantizedTensor(SPARSE_PLANES, replace(scheme, code=code), shape, parts)
    _code(tensor.scheme, shape)
    return tensor


def _sign_words(tensor: QuantizedTensor) -> Tensor:
    """Return the planes, flat and packed, (num_bits, words) int32."""
    scheme, parts, shape = tensor.scheme, tensor.parts, tensor.shape
    code, words = _code(scheme, shape), num_words(shape.out_features * shape.in_features)
    network = unpack_network(parts["xor_network"], code.num_inputs).transpose(0, 1).flatten(1)
    given = sequential_code.decoded(parts["code_words"], network).flatten()
    signs = given[: scheme.num_bits * words].view(scheme.num_bits, words)
    if not code.corrections:
        return signs
    limit = scheme.num_bits * code.kept
    lows = parts.get("correction_lows", parts["correction_places"])
    places = decode_places(lows, parts["correction_places"][0], code.corrections, limit)
    flips = _bits_at(places[places < limit], parts["kept_weights"], code.kept, scheme.num_bits)
    return signs ^ flips


def _bits_at(places: Tensor, kept: Tensor, count: int, num_bits: int) -> Tensor:
    """Return planes whose ones are at places among the weights that are kept.

    Args:
        places: (n,) int64, below num_bits * count; what is there twice is no one.
        kept: (1, words) int32, `count` ones.
        count: How many weights are kept.
        num_bits: Planes.

    Returns:
        (num_bits, words) int32.
    """
    found, times = places.unique(return_counts=True)
    found = found[times % 2 == 1]
    planes, ranks = found // count, found % count
    octets = unpack_bits(kept[0][:, None], WORD_BITS)  # the bits of each word
    ends = octets.sum(1, dtype=torch.int32).cumsum(0)
    words = torch.searchsorted(ends, ranks, right=True)
    behind = octets[words].flip(1).cumsum(1).flip(1)  # ones from each bit on
    is_it = (behind == (ends[words] - ranks)[:, None]) & (octets[words] == 1)
    bits = torch.ones_like(words, dtype=torch.int32) << is_it.to(torch.uint8).argmax(1)
    flips = torch.zeros(num_bits * len(ends), dtype=torch.int32, device=kept.device)
    flips.index_add_(0, planes * len(ends) + words, bits.to(torch.int32))
    return flips.view(num_bits, len(ends))


def in_twin_planes(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight, to the bit, in format `binary_coding`: two planes of each.

    Without parts, without.
    """
    scheme = replace(tensor.scheme.plain(), num_bits=2 * tensor.scheme.num_bits)
    parts = {}
    if tensor.parts:
        signs, kept = _sign_words(tensor), tensor.parts["kept_weights"]
        twins = torch.stack([signs, signs ^ ~kept], 1).flatten(0, 1)
        scales = tensor.parts["plane_scales"].repeat_interleave(2, 0)
        parts = {"bit_planes": _in_rows(twins, tensor.shape), "plane_scales": scales}
    return QuantizedTensor(binary_coding.BINARY_CODING, scheme, tensor.shape, parts)


def _in_rows(flat: Tensor, shape: Shape2D) -> Tensor:
    """Pack planes by rows: (planes, words) int32 -> (planes, out_features, words) int32."""
    if shape.in_features % WORD_BITS == 0:
        return flat.unflatten(1, (shape.out_features, -1)).contiguous()
    return pack_bits(unpack_bits(flat, shape.out_features * shape.in_features).view(-1, *shape))


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    return binary_coding.CODEC.dequantize(in_twin_planes(tensor), dtype)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another, binary-coded."""
    return binary_coding.CODEC.cat([in_twin_planes(tensor) for tensor in tensors], dim)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns, binary-coded."""
    narrowed(tensor, dim, start, length)
    return binary_coding.CODEC.narrow(in_twin_planes(tensor), dim, start, length)


CODEC = Codec(
    version=1,
    layout=_layout,
    dequantize=_dequantize,
    cat=_cat,
    narrow=_narrow,
    opened=in_twin_planes,
)
