"""Format `encrypted_planes`: planes that a network of XOR gates makes. docs/format.md, section 18.

FleXOR (arXiv 2009.04126): of N_out bits of a plane N_in are stored. When a model is loaded they
become the planes of `binary_coding`, which every backend runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qtool.base import Codec, PartSpec, QuantizedTensor, Trainable
from qtool.core import grouping
from qtool.core.packing import num_words, pack_bits, unpack_bits
from qtool.core.xor_gradients import xor_signs
from qtool.core.xor_networks import pack_network, through_network, unpack_network
from qtool.errors import SchemeError
from qtool.formats import binary_coding
from qtool.formats._parts import narrow_parameters, narrow_planes, narrowed
from qtool.scheme import BitCode, Shape2D, WeightScheme

ENCRYPTED_PLANES = "encrypted_planes"


def _code(scheme: WeightScheme) -> BitCode:
    """Return how bits are encrypted.

    Raises:
        SchemeError: the scheme doesn't say.
    """
    code = scheme.code
    if code is None or code.registers or code.kept or code.corrections:
        raise SchemeError(
            f"The code of encrypted planes is {code}; num_inputs and num_outputs are meant, and no "
            "registers, kept weights or corrections, which format sparse_planes has."
        )
    return code


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: encrypted planes, their networks, and binary coding's scales.

    A slice is N_out rows of one column.
    """
    code, bits = _code(scheme), scheme.num_bits
    parts = dict(binary_coding.CODEC.layout(scheme.plain(), shape))
    slices = -(-shape.out_features // code.num_outputs)
    words = num_words(shape.in_features)
    del parts["bit_planes"]
    return {
        "encrypted_planes": PartSpec("int32", (bits, slices, code.num_inputs, words)),
        "xor_networks": PartSpec("int32", (bits, code.num_outputs, num_words(code.num_inputs))),
        **parts,
    }


def encode_encrypted(encrypted: Tensor, networks: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """Store planes by what makes them.

    Args:
        encrypted: (num_bits, slices, num_inputs, words) int32, see `decrypt`.
        networks: (num_bits, num_outputs, num_inputs) uint8.
        like: A binary-coded weight, whose scales and offsets are taken.
    """
    code = BitCode(num_inputs=networks.shape[2], num_outputs=networks.shape[1])
    scheme = replace(like.scheme, code=code)
    parts = {
        "encrypted_planes": encrypted.contiguous(),
        "xor_networks": pack_network(networks),
        **{name: part for name, part in like.parts.items() if name != "bit_planes"},
    }
    return QuantizedTensor(ENCRYPTED_PLANES, scheme, like.shape, parts)


def decrypt(encrypted: Tensor, networks: Tensor, out_features: int) -> Tensor:
    """Return the planes, (num_bits, out_features, words) int32.

    Args:
        encrypted: (num_bits, slices, num_inputs, words) int32: bit i of word v is of column 32v+i,
            slice s of rows N_out s and following.
        networks: (num_bits, num_outputs, num_inputs) uint8.
        out_features: Rows; outputs of the last slice beyond them are dropped.
    """
    planes = [through_network(*each) for each in zip(encrypted, networks, strict=True)]
    return torch.stack(planes).flatten(1, 2)[:, :out_features].contiguous()


def encrypted_slices(rows: Tensor, num_outputs: int) -> Tensor:
    """Return rows (..., out_features, n) in slices (..., slices, num_outputs, n); zeros follow."""
    missing = -rows.shape[-2] % num_outputs
    return functional.pad(rows, (0, 0, 0, missing)).unflatten(-2, (-1, num_outputs))


def decrypted(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight, to the bit, in format `binary_coding`; without parts, without."""
    code, parts = _code(tensor.scheme), dict(tensor.parts)
    if parts:
        networks = unpack_network(parts.pop("xor_networks"), code.num_inputs)
        encrypted = parts.pop("encrypted_planes")
        parts["bit_planes"] = decrypt(encrypted, networks, tensor.shape.out_features)
    plain = tensor.scheme.plain()
    return QuantizedTensor(binary_coding.BINARY_CODING, plain, tensor.shape, parts)


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    return binary_coding.CODEC.dequantize(decrypted(tensor), dtype)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another, binary-coded."""
    return binary_coding.CODEC.cat([decrypted(tensor) for tensor in tensors], dim)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns; binary-coded if a slice is cut."""
    shape, size = narrowed(tensor, dim, start, length), _code(tensor.scheme).num_outputs
    if dim == 0 and start % size:
        return binary_coding.CODEC.narrow(decrypted(tensor), dim, start, length)
    encrypted = tensor.parts["encrypted_planes"]
    if dim == 1:
        cut = narrow_planes(encrypted, dim, start, length)
    else:
        cut = encrypted[:, start // size : -(-(start + length) // size)].contiguous()
    parts = {"encrypted_planes": cut, "xor_networks": tensor.parts["xor_networks"]}
    for name in tensor.parts.keys() - parts.keys():
        parts[name] = narrow_parameters(tensor.parts[name], tensor, dim, start, length)
    return QuantizedTensor(ENCRYPTED_PLANES, tensor.scheme, shape, parts)


def _trainable(tensor: QuantizedTensor) -> Trainable:
    """Let scales and offsets of a weight be learned, and its stored bits."""
    plain, scheme, shape = decrypted(tensor), tensor.scheme, tensor.shape
    learned = binary_coding.trainable(plain)
    networks = unpack_network(tensor.parts["xor_networks"], _code(scheme).num_inputs)
    gates = networks.float().unsqueeze(1)

    def signs(latent: Tensor, sharpness: float) -> Tensor:
        planes = xor_signs(latent, gates, sharpness).flatten(1, 2)[:, : shape.out_features]
        rows = [grouping.to_rows(plane, scheme) for plane in planes]
        return torch.stack([grouping.split(each, scheme.group_size) for each in rows])

    def stored(values: Mapping[str, Tensor], codes: Tensor) -> QuantizedTensor:
        found, offsets = (each.to(torch.float16) for each in learned.planes(values))
        parts = {**plain.parts, "plane_scales": grouping.to_stored(found, scheme)}
        if not scheme.symmetric:
            parts["plane_offsets"] = grouping.to_stored(offsets, scheme)
        return encode_encrypted(pack_bits(codes), networks, replace(plain, parts=parts))

    codes = unpack_bits(tensor.parts["encrypted_planes"], shape.in_features)
    return replace(learned, codes=codes, stored=stored, signs=signs)


CODEC = Codec(
    version=1,
    layout=_layout,
    dequantize=_dequantize,
    cat=_cat,
    narrow=_narrow,
    trainable=_trainable,
    opened=decrypted,
)
