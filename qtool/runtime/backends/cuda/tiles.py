"""The layout in which the GPU kernels read bit planes: tiles of 16 rows, units of 256 inputs.

One 16-byte load per lane of a warp brings 16 rows x 256 inputs of one plane; the 32-bit words hold
the bits where the tensor cores want them, so that nothing is moved at run time. Planes of a unit
are neighbours. Which bit is which weight stands in kernels/common.cuh.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.packing import unpack_bits
from qtool.runtime.backends.cuda.centers import CENTERS
from qtool.scheme import Shape2D, WeightScheme

TILE_ROWS = 16
UNIT = 256
LANES = 32
BITS_AT_ONCE = 2**26
"""While they are packed, a bit takes up to 18 bytes."""
WORDS = UNIT // 64
"""Words of a lane in a unit; each holds 64 inputs."""
WORD_BYTES, HALF_BYTES = 4, 2
NIBBLES = 0x11111111
"""The lowest bit of each nibble of a word."""
NIBBLE_PLANES = 4
"""Planes that are packed as nibbles."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A binary-coded weight with groups along in_features, re-laid for the kernels."""

    planes: Tensor
    """(row_tiles, units, num_bits, 32, 4) int32; where there are centers, as
    kernels/bit_plane_nibbles.cuh says."""
    scales: Tensor
    """(row_tiles, groups, 8, num_bits + offset, 2) float16: of rows g and g + 8, the offset, or the
    center of an affine weight, last; of all groups that the units have, zeros where a row has no
    more."""


def pack(tensor: QuantizedTensor) -> Tiles:
    """Re-lay a weight of format `binary_coding` with groups along in_features.

    Rows are padded to 16 and inputs to 256; the kernels give padding an input of zero.
    """
    inputs = tensor.shape.in_features
    tiles_at_once = max(1, BITS_AT_ONCE // (tensor.scheme.num_bits * inputs * TILE_ROWS))
    planes = tensor.parts["bit_planes"].split(tiles_at_once * TILE_ROWS, dim=1)
    nibbled = CENTERS in tensor.parts
    packed = [pack_planes(_padded(unpack_bits(part, inputs)), nibbled=nibbled) for part in planes]
    return Tiles(packed[0] if len(packed) == 1 else torch.cat(packed), pack_parameters(tensor))


def packed_bytes(scheme: WeightScheme, shape: Shape2D) -> int:
    """Return what `pack` takes, from scheme and shape alone."""
    row_tiles, units = -(-shape.out_features // TILE_ROWS), -(-shape.in_features // UNIT)
    planes = row_tiles * units * scheme.num_bits * LANES * WORDS * WORD_BYTES
    parameters = scheme.num_bits + (not scheme.symmetric)
    return planes + row_tiles * TILE_ROWS * _num_groups(scheme, shape) * parameters * HALF_BYTES


def _num_groups(scheme: WeightScheme, shape: Shape2D) -> int:
    """Return how many groups of a row are packed: all that the units have."""
    inputs = shape.in_features
    size = scheme.group_size or inputs
    return -(-(-(-inputs // UNIT) * UNIT) // size) if size < inputs else 1


def _padded(bits: Tensor) -> Tensor:
    """Pad planes to whole tiles and units."""
    return torch.nn.functional.pad(bits, (0, -bits.shape[2] % UNIT, 0, -bits.shape[1] % TILE_ROWS))


def pack_parameters(tensor: QuantizedTensor) -> Tensor:
    """Re-lay scales, then offsets or centers, each (out_features, num_groups), by tiles."""
    rows = tensor.shape.out_features
    listed = list(tensor.parts["plane_scales"])
    if not tensor.scheme.symmetric:
        listed.append(tensor.parts.get("plane_offsets", tensor.parts.get(CENTERS)))
    groups = _num_groups(tensor.scheme, tensor.shape)
    more = (0, groups - listed[0].shape[1], 0, -rows % TILE_ROWS)
    padded = torch.nn.functional.pad(torch.stack(listed), more)
    split = padded.unflatten(1, (-1, 2, 8))  # parameter, tile, r, g, group
    return split.permute(1, 4, 3, 0, 2).contiguous()


def pack_planes(bits: Tensor, *, nibbled: bool = False) -> Tensor:
    """Pack planes of whole tiles and units; `nibbled`: as those of equal steps.

    (num_bits, rows, inputs) uint8 -> (row_tiles, units, num_bits, 32, 4) int32.
    """
    num_bits, rows, inputs = bits.shape
    # row = 8 r + g; input = 256 unit + 64 word + 32 upper + 8 t + 2 (pair & 3) + half
    split = bits.view(
        num_bits, rows // TILE_ROWS, 2, 8, inputs // UNIT, WORDS, 2, 4, 4, 2
    )  # plane, tile, r, g, unit, word, upper, t, pair & 3, half
    # bit = 16 half + 8 upper + 2 (pair & 3) + r; lane = 4 g + t
    ordered = split.permute(1, 4, 0, 3, 7, 5, 9, 6, 8, 2)
    flat = ordered.reshape(rows // TILE_ROWS, inputs // UNIT, num_bits, LANES, WORDS, 32)
    if nibbled:
        flat = torch.cat([_nibbled(planes.flip(2)) for planes in by_nibble(flat)], 2)
    weights = 2 ** torch.arange(32, device=bits.device, dtype=torch.int64)
    words = (flat.to(torch.int64) * weights).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # two's complement


def by_nibble(planes: Tensor) -> tuple[Tensor, ...]:
    """Return the planes (row_tiles, units, num_bits, ...) above the lowest four, and those."""
    more = max(0, planes.shape[2] - NIBBLE_PLANES)
    return (planes[:, :, :more], planes[:, :, more:]) if more else (planes,)


def nibble_words(words: Tensor) -> Tensor:
    """Return the words of nibbles that 2 to 4 stored ones hold; above their bits is anything.

    (row_tiles, units, count, 32, 4) int32 -> the same with 4 words of 3 or 4, or 2 of 2, which have
    words 2 and 3 two bits higher.
    """
    if words.shape[2] != 3:  # noqa: PLR2004 - three words have a bit to spare
        return words
    spare = [((words[:, :, bit] >> 3) & NIBBLES) << bit for bit in range(3)]
    return torch.cat([words, (spare[0] | spare[1] | spare[2]).unsqueeze(2)], 2)


def stored_words(nibbles: Tensor, count: int) -> Tensor:
    """Invert `nibble_words`, of `count` planes."""
    if count != 3:  # noqa: PLR2004
        return nibbles
    last = nibbles[:, :, 3]
    words = [
        (nibbles[:, :, bit] & 7 * NIBBLES) | (((last >> bit) & NIBBLES) << 3) for bit in range(3)
    ]
    return torch.stack(words, 2)


def _turned(bits: Tensor) -> Tensor:
    """Exchange the number of a word, of four, and that of a bit in its nibble; twice is nothing.

    (row_tiles, units, 4, 32, 4, 32) -> the same.
    """
    split = bits.unflatten(2, (2, 2)).unflatten(-1, (8, 2, 2))
    return split.permute(0, 1, 7, 8, 4, 5, 6, 2, 3).reshape(bits.shape)


def _nibbled(planes: Tensor) -> Tensor:
    """Return the bits of planes, the lowest first, as kernels/bit_plane_nibbles.cuh has them.

    (row_tiles, units, up to 4, 32, 4, 32) uint8 -> the same.
    """
    count = planes.shape[2]
    if count == 1:
        return planes
    padded = torch.cat(
        [planes, planes.new_zeros(*planes.shape[:2], NIBBLE_PLANES, *planes.shape[3:])], 2
    )
    words = _turned(padded[:, :, :NIBBLE_PLANES]).unflatten(-1, (8, NIBBLE_PLANES))
    for word in range(count, NIBBLE_PLANES):
        if count == 3:  # noqa: PLR2004 - three words have a bit to spare
            words[:, :, :word, ..., 3] = words[:, :, word, ..., :3].movedim(-1, 2)
        else:
            words[:, :, word - 2, ..., 2:] = words[:, :, word, ..., :2]
    return words[:, :, :count].flatten(-2)


def _planes(words: Tensor) -> Tensor:
    """Invert `_nibbled`."""
    count = words.shape[2]
    if count == 1:
        return words
    padded = torch.cat(
        [words, words.new_zeros(*words.shape[:2], NIBBLE_PLANES, *words.shape[3:])], 2
    )
    split = padded[:, :, :NIBBLE_PLANES].unflatten(-1, (8, NIBBLE_PLANES))
    for word in range(count, NIBBLE_PLANES):
        if count == 3:  # noqa: PLR2004
            split[:, :, word, ..., :3] = split[:, :, :word, ..., 3].movedim(2, -1)
        else:
            split[:, :, word, ..., :2] = split[:, :, word - 2, ..., 2:]
    return _turned(split.flatten(-2))[:, :, :count]


def unpack_planes(planes: Tensor, *, nibbled: bool = False) -> Tensor:
    """Invert `pack_planes`."""
    row_tiles, units, num_bits = planes.shape[:3]
    shifts = torch.arange(32, device=planes.device, dtype=torch.int32)
    flat = ((planes.unsqueeze(-1) >> shifts) & 1).to(torch.uint8)
    if nibbled:
        flat = torch.cat([_planes(words).flip(2) for words in by_nibble(flat)], 2)
    ordered = flat.view(row_tiles, units, num_bits, 8, 4, WORDS, 2, 2, 4, 2)
    split = ordered.permute(2, 0, 9, 3, 1, 5, 7, 4, 8, 6)
    return split.reshape(num_bits, row_tiles * TILE_ROWS, units * UNIT)


def unpack(
    tiles: Tiles, shape: Shape2D, group: int, *, centered: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales, then offsets or centers, of each weight, and its signs.

    Returns:
        (parameters, out_features, in_features) and (num_bits, out_features, in_features) float32.
    """
    rows, inputs = shape
    scales = tiles.scales.permute(3, 0, 4, 2, 1).flatten(1, 3)[:, :rows].float()
    of_input = torch.arange(inputs, device=scales.device) // group
    bits = unpack_planes(tiles.planes, nibbled=centered)
    return scales[:, :, of_input], 2 * bits[:, :rows, :inputs].float() - 1
