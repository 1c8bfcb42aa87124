"""Weights as kernels/int_gemm.cu reads them: integers in the order of its fragments, and scales.

A tile is 128 outputs x 128 inputs: for each half of the outputs the codes as 128 threads load them,
16 bytes at a time; then 128 float32 scales; then 128 words, of bytes that are 128 less a zero
point. Fragments are those of `wgmma.mma_async.m64nNk32` (PTX ISA, matrix A in registers): lane
4 g + t of a warp has rows g and g + 8 of its 16, and inputs 4 t .. 4 t + 3 and those 16 further on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core import dint as dint_core
from qtool.core.packing import planes_to_codes
from qtool.formats import affine, dint
from qtool.scheme import MAX_BITS, Shape2D

INT_TILE = 128
"""Outputs, inputs and tokens of a tile."""
NIBBLE = 4
"""Bits up to which codes are unpacked on the card, and zero points are taken from them there."""
MIDDLE = 128
NUMBERS_BYTES = 8 * INT_TILE
"""Scales and zero points of a tile."""
MOST_INPUTS = 57344
"""That a block of kernels/quantize_rows.cu holds in registers."""


@dataclass(frozen=True, slots=True)
class IntTiles:
    """A weight whose integers the tensor cores multiply, group by group."""

    tiles: Tensor  # (row tiles, blocks of inputs, bytes) uint8
    shape: Shape2D
    bits: int
    """4: unsigned codes and zero points; 8: signed bytes."""
    span: int
    """Blocks of a group; 0: one group is the row."""


def bits_of_tiles(tensor: QuantizedTensor) -> int | None:
    """Return 4 or 8, None for a weight that can't be tiled; its parts aren't looked at.

    Groups have to be whole blocks of inputs, and integers less their zero points fit a byte.
    """
    scheme, inputs = tensor.scheme, tensor.shape.in_features
    size = scheme.group_size or inputs
    whole = size % INT_TILE == 0 or size >= inputs
    if scheme.group_dim != "in_features" or not whole:
        return None
    if inputs % INT_TILE or inputs > MOST_INPUTS:
        return None
    if tensor.format == affine.AFFINE:
        if scheme.num_bits <= NIBBLE:
            return NIBBLE
        return MAX_BITS if scheme.num_bits < MAX_BITS or scheme.symmetric else None
    widest = dint_core.WIDEST_IN_INT8[scheme.symmetric]
    return MAX_BITS if tensor.format == dint.DINT and scheme.num_bits <= widest else None


def tile_bytes(tensor: QuantizedTensor) -> int:
    """Return what `tile_integers` makes of a weight, whose parts aren't looked at."""
    bits = bits_of_tiles(tensor)
    if bits is None:
        return 0
    row_tiles = -(-tensor.shape.out_features // INT_TILE)
    per_tile = INT_TILE * INT_TILE * bits // 8 + NUMBERS_BYTES
    return row_tiles * (tensor.shape.in_features // INT_TILE) * per_tile


def tile_integers(tensor: QuantizedTensor) -> IntTiles | None:
    """Re-lay a weight of format `affine` or `dint`; None: `bits_of_tiles`."""
    bits = bits_of_tiles(tensor)
    if bits is None:
        return None
    scheme, (rows, inputs) = tensor.scheme, tensor.shape
    one_group = scheme.num_groups(tensor.shape) == 1
    span = 0 if one_group else (scheme.group_size or inputs) // INT_TILE
    integers, scales, zeros = _parts(tensor, bits)
    more = -rows % INT_TILE
    codes = torch.nn.functional.pad(integers, (0, 0, 0, more))
    numbers = [_by_block(part, more, span, inputs // INT_TILE) for part in (scales, zeros)]
    packed = _fragments(codes.view(torch.uint8), bits)
    tiles = torch.cat([packed, *(part.view(torch.uint8) for part in numbers)], dim=-1)
    return IntTiles(tiles.contiguous(), tensor.shape, bits, span)


def _parts(tensor: QuantizedTensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers (rows, inputs) of one byte; by group scales, and words of zero points."""
    if tensor.format == dint.DINT:
        integers, scales = dint.doubled_codes(tensor)
        return integers, scales, torch.zeros_like(scales, dtype=torch.int32)
    scales, zeros = tensor.parts["scales"].float(), affine.zero_points(tensor)
    codes = planes_to_codes(tensor.parts["codes"], tensor.shape.in_features)
    if bits == NIBBLE:
        return codes, scales, (MIDDLE - zeros.to(torch.int32)) * 0x01010101
    size = tensor.scheme.group_size or tensor.shape.in_features
    spread = zeros.to(torch.int16).repeat_interleave(size, dim=1)[:, : tensor.shape.in_features]
    integers = (codes.to(torch.int16) - spread).to(torch.int8)
    return integers, scales, torch.zeros_like(scales, dtype=torch.int32)


def _by_block(part: Tensor, more: int, span: int, blocks: int) -> Tensor:
    """Return numbers of groups (rows, groups) by tile: (row tiles, blocks, 128)."""
    each = part.expand(-1, blocks) if span == 0 else part.repeat_interleave(span, dim=1)
    padded = torch.nn.functional.pad(each[:, :blocks], (0, 0, 0, more))
    return padded.view(-1, INT_TILE, blocks).transpose(1, 2).contiguous()


def _fragments(codes: Tensor, bits: int) -> Tensor:
    """Return bytes (rows, inputs) by tile, in the order of loads: (row tiles, blocks, bytes)."""
    row_tiles, blocks = codes.shape[0] // INT_TILE, codes.shape[1] // INT_TILE
    # row tile, consumer, warp, + 8 rows, g; block, step, + 16 inputs, t, byte
    split = codes.view(row_tiles, 2, 4, 2, 8, blocks, 4, 2, 4, 4)
    if bits == NIBBLE:
        low, high = split.unbind(7)
        joined = low | high << NIBBLE  # (R, consumer, warp, + 8, g, block, step, t, byte)
        pairs = joined.unflatten(6, (2, 2))
        ordered = pairs.permute(0, 5, 1, 6, 2, 4, 8, 7, 3, 9)
    else:
        ordered = split.permute(0, 5, 1, 6, 2, 4, 8, 7, 3, 9)
    return ordered.reshape(row_tiles, blocks, -1)
