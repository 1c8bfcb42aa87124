"""Weights that meet quantized inputs as integers, on the int8 tensor cores.

On compute capability 9.0 by a kernel of ours, which knows groups (`int_linear`); elsewhere those
with one scale per row, by torch.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.activations import quantize_activations
from qtool.core.packing import planes_to_codes
from qtool.formats import affine
from qtool.runtime.backends.cuda.int_tiles import INT_TILE, IntTiles, tile_bytes, tile_integers
from qtool.runtime.backends.cuda.launch import KERNEL_DTYPES, WARPGROUPS
from qtool.runtime.backends.cuda.operators import int_linear_operator
from qtool.scheme import ActivationScheme, Shape2D

MULTIPLE, FEWEST_ROWS = 8, 17
"""What `torch._int_mm` takes: sizes of a weight, and tokens, that it has at least."""
FEWEST_TOKENS = 64
"""Where a product on tensor cores begins to be bound by its operations; not measured yet."""
FEWEST_TILED = INT_TILE
"""A guess: a tile of tokens."""
WIDE_BITS = 8
"""Codes less zero points of so many bits don't fit 8 bits; of fewer they do."""


@dataclass(frozen=True, slots=True)
class RowIntegers:
    """A weight scales * (integers - shifts), filled up with zeros to what the product takes."""

    integers: Tensor  # (in_features, out_features) int8, each column contiguous
    scales: Tensor  # (out_features,) float32
    shifts: Tensor | None
    """(out_features,) int32; None: all are 0."""
    in_features: int
    fewest_tokens: int = FEWEST_TOKENS

    def linear(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        """Return x @ W.T, x quantized: (tokens, in_features) -> (tokens, out_features)."""
        codes, steps = quantize_activations(x, scheme)
        return (self.multiply(codes) * steps).to(x.dtype)

    def multiply(self, codes: Tensor) -> Tensor:
        """Return codes @ W.T: (tokens, in_features) int8 -> (tokens, out_features) float32.

        Sums are exact in 32 bits up to 130,000 inputs.
        """
        tokens, out_features = len(codes), len(self.scales)
        rows = max(0, FEWEST_ROWS - tokens)
        columns = len(self.integers) - self.in_features
        filled = torch.nn.functional.pad(codes, (0, columns, 0, rows)) if rows + columns else codes
        sums = torch._int_mm(filled, self.integers)[:tokens, :out_features]
        if self.shifts is not None:
            sums = sums - codes.sum(-1, keepdim=True, dtype=torch.int32) * self.shifts
        return sums * self.scales


@dataclass(frozen=True, slots=True)
class TiledIntegers:
    """A weight in tiles, on a card that multiplies these."""

    weight: IntTiles
    fewest_tokens: int = FEWEST_TILED

    def linear(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        """Return x @ W.T, x quantized: (tokens, in_features) -> (tokens, out_features)."""
        return int_linear_operator(x, self.weight, scheme)


def integer_product(
    tensor: QuantizedTensor, dtype: torch.dtype
) -> TiledIntegers | RowIntegers | None:
    """Return a weight for quantized inputs of `dtype`; None: floats multiply those."""
    device = next(iter(tensor.parts.values())).device
    tiles = None
    if device.type == "cuda" and dtype in KERNEL_DTYPES:
        able = torch.cuda.get_device_capability(device) == WARPGROUPS
        tiles = tile_integers(tensor) if able else None
    return row_integers(tensor) if tiles is None else TiledIntegers(tiles)


def row_integers(tensor: QuantizedTensor) -> RowIntegers | None:
    """Return a weight for integer products; None: it isn't affine with one scale per row."""
    scheme, shape = tensor.scheme, tensor.shape
    if not _has_one_scale_per_row(tensor):
        return None
    codes = planes_to_codes(tensor.parts["codes"], shape.in_features).to(torch.int16)
    zeros = affine.zero_points(tensor).to(torch.int16)  # (out_features, 1)
    wide = scheme.num_bits == WIDE_BITS
    middle = torch.full_like(zeros, 2 ** (WIDE_BITS - 1)) if wide else zeros
    shifts = (zeros - middle).squeeze(1).to(torch.int32)
    out_features, in_features = _filled(shape)
    filling = (0, in_features - shape.in_features, 0, out_features - shape.out_features)
    integers = torch.nn.functional.pad((codes - middle).to(torch.int8), filling)
    return RowIntegers(
        integers=integers.contiguous().T,
        scales=tensor.parts["scales"].squeeze(1).float(),
        shifts=shifts if bool(shifts.any()) else None,
        in_features=shape.in_features,
    )


def integer_bytes(tensor: QuantizedTensor) -> int:
    """Return what `integer_product` makes of a weight, whose parts aren't looked at; at most."""
    return max(tile_bytes(tensor), _row_bytes(tensor))


def _row_bytes(tensor: QuantizedTensor) -> int:
    if not _has_one_scale_per_row(tensor):
        return 0
    wide = tensor.scheme.num_bits == WIDE_BITS and not tensor.scheme.symmetric
    numbers = 2 if wide else 1  # of 4 bytes, for a row
    return prod(_filled(tensor.shape)) + 4 * numbers * tensor.shape.out_features


def _has_one_scale_per_row(tensor: QuantizedTensor) -> bool:
    one_group = tensor.scheme.num_groups(tensor.shape) == 1
    along_inputs = tensor.scheme.group_dim == "in_features"
    return tensor.format == affine.AFFINE and along_inputs and one_group


def _filled(shape: Shape2D) -> Shape2D:
    return Shape2D(*(-(-size // MULTIPLE) * MULTIPLE for size in shape))
