"""Weights with one scale per row, multiplied by integer activations on the int8 tensor cores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.packing import planes_to_codes
from qtool.formats import affine

MULTIPLE, FEWEST_ROWS = 8, 17
"""What `torch._int_mm` takes: sizes of a weight, and tokens, that it has at least."""
FEWEST_TOKENS = 64
"""Where a product on tensor cores begins to be bound by its operations; not measured yet."""
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


def row_integers(tensor: QuantizedTensor) -> RowIntegers | None:
    """Return a weight for integer products; None: it isn't affine with one scale per row."""
    scheme, shape = tensor.scheme, tensor.shape
    one_group = scheme.group_dim == "in_features" and scheme.num_groups(shape) == 1
    if tensor.format != affine.AFFINE or not one_group:
        return None
    codes = planes_to_codes(tensor.parts["codes"], shape.in_features).to(torch.int16)
    zeros = affine.zero_points(tensor).to(torch.int16)  # (out_features, 1)
    wide = scheme.num_bits == WIDE_BITS
    middle = torch.full_like(zeros, 2 ** (WIDE_BITS - 1)) if wide else zeros
    shifts = (zeros - middle).squeeze(1).to(torch.int32)
    columns, rows = (-size % MULTIPLE for size in (shape.in_features, shape.out_features))
    integers = torch.nn.functional.pad((codes - middle).to(torch.int8), (0, columns, 0, rows))
    return RowIntegers(
        integers=integers.contiguous().T,
        scales=tensor.parts["scales"].squeeze(1).float(),
        shifts=shifts if bool(shifts.any()) else None,
        in_features=shape.in_features,
    )
