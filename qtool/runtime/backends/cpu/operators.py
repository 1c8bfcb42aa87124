"""Products with packed weights as operators of torch, so that `torch.compile` leaves them whole."""

import torch
from torch import Tensor

from qtool.runtime.backends.cpu.packing import BLOCK_ROWS, PACKED_WEIGHTS, PackedWeight

OPERATORS = torch.library.Library("qtool_cpu", "DEF")
OPERATORS.define("matmul(Tensor x, Tensor handle, int rows) -> Tensor")
OPERATORS.define("rows(Tensor index, Tensor handle, int inputs, ScalarType dtype) -> Tensor")
OPERATORS.define("dense(Tensor handle, int rows, int inputs, ScalarType dtype) -> Tensor")
MOST_BY_TABLES = 16
"""Tokens up to which tables are sooner done than a dequantized weight and torch's product."""


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x @ W.T, shaped (..., out_features), in the dtype of `x`."""
    return torch.ops.qtool_cpu.matmul(x, weight.handle, weight.shape.out_features)


def packed_rows(index: Tensor, weight: PackedWeight) -> Tensor:
    """Return the rows that `index` names, shaped (*index.shape, in_features)."""
    inputs = weight.shape.in_features
    return torch.ops.qtool_cpu.rows(index, weight.handle, inputs, weight.dtype)


def packed_dense(weight: PackedWeight) -> Tensor:
    """Return W, (out_features, in_features)."""
    return torch.ops.qtool_cpu.dense(weight.handle, *weight.shape, weight.dtype)


def _matmul(x: Tensor, handle: Tensor, rows: int) -> Tensor:
    weight, tokens = PACKED_WEIGHTS[int(handle)], x.reshape(-1, x.shape[-1])
    if len(tokens) <= MOST_BY_TABLES:
        return weight.multiply(tokens).to(x.dtype).view(*x.shape[:-1], rows)
    y = tokens.new_empty(len(tokens), rows)
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        block = weight.block(first, count).to(x.dtype)
        y[:, first : first + count] = tokens @ block.T
    return y.view(*x.shape[:-1], rows)


def _rows(index: Tensor, handle: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    del inputs
    return PACKED_WEIGHTS[int(handle)].rows(index).to(dtype)


def _dense(handle: Tensor, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    del rows, inputs
    return PACKED_WEIGHTS[int(handle)].dense().to(dtype)


OPERATORS.impl("matmul", _matmul, "CPU")
OPERATORS.impl("rows", _rows, "CPU")
OPERATORS.impl("dense", _dense, "CPU")


@torch.library.register_fake("qtool_cpu::matmul", lib=OPERATORS)  # type: ignore[untyped-decorator]
def _(x: Tensor, handle: Tensor, rows: int) -> Tensor:
    del handle
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("qtool_cpu::rows", lib=OPERATORS)  # type: ignore[untyped-decorator]
def _(index: Tensor, handle: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    del handle
    return index.new_empty(*index.shape, inputs, dtype=dtype)


@torch.library.register_fake("qtool_cpu::dense", lib=OPERATORS)  # type: ignore[untyped-decorator]
def _(handle: Tensor, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return handle.new_empty(rows, inputs, dtype=dtype)
