"""Where weights of encoded planes begin: those nearest to a weight that isn't quantized."""

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core import alternating, binary_coding, grouping
from qtool.core.packing import pack_bits, unpack_bits
from qtool.core.sequential_code import MEMORY
from qtool.core.xor_networks import nearest_inputs, through_network
from qtool.errors import SchemeError
from qtool.formats import binary_coding as binary_format
from qtool.formats.encrypted_planes import encode_encrypted, encrypted_slices
from qtool.formats.sparse_planes import encode_sparse
from qtool.scheme import BitCode, Shape2D, WeightScheme

MOST_TRIED_INPUTS = 16
"""Stored bits of a slice of which all values are tried."""
CODE_SHARE = 0.88
"""Stored bits for each sign that is kept: somewhat fewer, and more corrections, is least in all."""


def encrypted_start(weight: Tensor, networks: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Return the encrypted weight that is nearest, plane after plane.

    Args:
        weight: (out_features, in_features) float32.
        networks: (num_bits, num_outputs, num_inputs) uint8.
        scheme: Bits and grouping.

    Raises:
        SchemeError: slices have too many stored bits.
    """
    if networks.shape[2] > MOST_TRIED_INPUTS:
        raise SchemeError(
            f"A slice of {networks.shape[2]} stored bits is more than can be tried; 1 to "
            f"{MOST_TRIED_INPUTS} are meant. Take smaller slices of the same ratio."
        )
    shape, left = Shape2D(*weight.shape), weight
    offsets = _means(weight, scheme)
    if not scheme.symmetric:
        left = weight - _spread(offsets, scheme, shape)
    encrypted, planes, scales = [], [], []
    for network in networks:
        stored, bits = _nearest_plane(left, network)
        signs = bits[: shape.out_features] * 2.0 - 1
        scale = _means(left * signs, scheme).clamp(min=0)
        left = left - signs * _spread(scale, scheme, shape)
        encrypted.append(stored)
        planes.append(pack_bits(bits[: shape.out_features].to(torch.uint8)))
        scales.append(scale)
    kept = binary_format.descending(torch.stack(scales)).to(torch.float16)
    parts = {"bit_planes": torch.stack(planes), "plane_scales": grouping.to_stored(kept, scheme)}
    if not scheme.symmetric:
        parts["plane_offsets"] = grouping.to_stored(offsets.to(torch.float16), scheme)
    like = QuantizedTensor(binary_format.BINARY_CODING, scheme, shape, parts)
    return encode_encrypted(torch.stack(encrypted), networks, like)


def _nearest_plane(left: Tensor, network: Tensor) -> tuple[Tensor, Tensor]:
    """Return stored bits (slices, num_inputs, words) int32, and the plane they make, 0 or 1."""
    slices = encrypted_slices(left, len(network))  # (slices, num_outputs, in_features)
    wanted = slices.transpose(0, 1).flatten(1)
    bits = nearest_inputs(wanted, network).unflatten(1, (len(slices), -1)).transpose(0, 1)
    stored = pack_bits(bits)
    made = unpack_bits(through_network(stored, network), left.shape[1])
    return stored, made.flatten(0, 1)


def _means(values: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the means of groups, (rows, num_groups)."""
    rows = grouping.split(grouping.to_rows(values, scheme), scheme.group_size)
    length = scheme.grouped_length(Shape2D(*values.shape))
    return rows.sum(-1) / grouping.valid(length, scheme.group_size, values.device).sum(-1)


def _spread(parameters: Tensor, scheme: WeightScheme, shape: Shape2D) -> Tensor:
    return grouping.spread(grouping.to_stored(parameters, scheme), scheme, shape)


def sparse_code(sparsity: float, memory: int) -> BitCode:
    """Return what a decoder takes and gives, in the least stored bits, corrections counted.

    Args:
        sparsity: Share of the weights that are zero, at random places; of 0 no sign is lost.
        memory: Bits that the registers hold, in `core.sequential_code.MEMORY`.
    """
    if not sparsity:
        return BitCode(num_inputs=1, num_outputs=1, registers=MEMORY[0])
    outputs = round(memory / (CODE_SHARE * (1 - sparsity)))
    return BitCode(num_inputs=memory, num_outputs=outputs, registers=1)


def sparse_start(
    weight: Tensor, kept: Tensor, network: Tensor, scheme: WeightScheme
) -> QuantizedTensor:
    """Return the weight whose kept ones are nearest, and all others zero.

    Args:
        weight: (out_features, in_features) float32.
        kept: (out_features, in_features) bool.
        network: As `core.sequential_code.serial_network` gives it.
        scheme: Symmetric, with a code.
    """
    if not bool(kept.any()):  # the format wants one: it becomes zero by its scale
        kept = torch.zeros_like(kept)
        kept[0, 0] = True
    codes, halves = _sparse_fit(weight, kept, scheme)
    length = scheme.grouped_length(Shape2D(*weight.shape))
    matrix = grouping.to_rows(grouping.join(codes, length), scheme)
    planes = [(matrix >> bit) & 1 for bit in reversed(range(scheme.num_bits))]
    stored = grouping.to_stored(halves.movedim(-1, 0), scheme)
    return encode_sparse(torch.stack(planes), kept, stored, network, scheme)


def sparse_values(weight: Tensor, kept: Tensor, scheme: WeightScheme) -> Tensor:
    """Return what `sparse_start` makes of a weight, with no search for encoded bits: float32."""
    codes, halves = _sparse_fit(weight, kept, scheme)
    scales = halves.float().flatten(0, 1) * 2
    levels = binary_coding.levels(scales, scales.new_zeros(len(scales)))
    made = levels.gather(-1, codes.flatten(0, 1).long()).view(codes.shape)
    length = scheme.grouped_length(Shape2D(*weight.shape))
    return grouping.to_rows(grouping.join(made, length), scheme) * kept


def _sparse_fit(weight: Tensor, kept: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Return codes in rows of groups, and halves of scales (rows, num_groups, num_bits) float16."""
    rows, cares = (
        grouping.split(grouping.to_rows(each.float(), scheme), scheme.group_size)
        for each in (weight * kept, kept)
    )
    options = alternating.FitOptions(num_bits=scheme.num_bits, offset=False)
    found, _, _ = alternating.fit(rows.flatten(0, 1), cares.flatten(0, 1), options)
    halves = found.abs().sort(-1, descending=True).values.div(2).to(torch.float16)
    none = halves.new_zeros(len(halves), dtype=torch.float32)
    codes = binary_coding.assign(rows.flatten(0, 1), halves.float() * 2, none)
    return codes.view(rows.shape), halves.unflatten(0, rows.shape[:2])
