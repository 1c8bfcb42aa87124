"""Products with packed weights as operators of torch, so that `torch.compile` leaves them whole."""

import torch
from torch import Tensor

from qtool.runtime.backends.cpu.packing import PACKED_WEIGHTS, PackedWeight

OPERATORS = torch.library.Library("qtool_cpu", "DEF")
OPERATORS.define("matmul(Tensor x, Tensor handle, int rows) -> Tensor")
OPERATORS.define("rows(Tensor index, Tensor handle, int inputs, ScalarType dtype) -> Tensor")
OPERATORS.define("dense(Tensor handle, int rows, int inputs, ScalarType dtype) -> Tensor")
MOST_TABLES = 64
"""Of tokens, that are in memory."""
BLOCK_ROWS, BLOCK_ELEMENTS = 1024, 2**21
"""Of a weight, that are dequantized at once: as many rows, or more if they have few elements."""
FEW_BY_TABLES = 16
TABLE_COST = {"avx512": 0.037, "avx2": 0.2}
"""Of a token and a plane by tables: milliseconds of 4096 x 4096 weights, two threads of a Zen 4, of
which only the ratio to the next ones counts. At other levels few tokens go by tables."""
BLOCK_COSTS = {torch.float32: (20.0, 0.165)}
NARROW_COSTS = (15.0, 0.07)
"""Of dequantizing a weight, and of a token by torch's product in its dtype."""


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


def prefers_tables(weight: PackedWeight, tokens: int, dtype: torch.dtype) -> bool:
    """Return whether tables are sooner done than a dequantized weight and torch's product."""
    if tokens <= FEW_BY_TABLES or weight.level not in TABLE_COST or weight.tables == "float32":
        return tokens <= FEW_BY_TABLES
    once, each = BLOCK_COSTS.get(dtype, NARROW_COSTS)
    return TABLE_COST[weight.level] * weight.table_work * tokens <= once + each * tokens


def _matmul(x: Tensor, handle: Tensor, rows: int) -> Tensor:
    weight, tokens = PACKED_WEIGHTS[int(handle)], x.reshape(-1, x.shape[-1])
    y = tokens.new_empty(len(tokens), rows)
    if prefers_tables(weight, len(tokens), x.dtype):
        for part, target in zip(tokens.split(MOST_TABLES), y.split(MOST_TABLES), strict=True):
            target.copy_(weight.multiply(part))
        return y.view(*x.shape[:-1], rows)
    most = max(BLOCK_ROWS, BLOCK_ELEMENTS // x.shape[-1])
    if rows <= most:
        torch.mm(tokens, weight.block(0, rows).to(x.dtype).T, out=y)
        return y.view(*x.shape[:-1], rows)
    for first in range(0, rows, most):
        block = weight.block(first, min(most, rows - first)).to(x.dtype)
        y[:, first : first + most] = tokens @ block.T
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
