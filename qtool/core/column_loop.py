"""The column loop: quantize the columns of one block in order, each moving those that are left.

Error feedback and coordinate descent are the same walk. They differ in what they work on (values to
quantize, or a gradient) and in the matrix that says how a column's step moves the later ones.
Weights are columns first, (columns, rows), see `grids`.
"""

from types import ModuleType

import torch
from torch import Tensor

from qtool.core.grids import Pick, Tables
from qtool.core.kernel_modules import usable_kernels

STRIP = 16
"""Columns whose steps are passed on together to the columns behind them: a matrix product moves
them through memory once, where one outer product per column would sixteen times."""


def walk_columns(
    pick: Pick, work: Tensor, matrix: Tensor, tables: Tables, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block in order, the fastest way that the device has.

    Args:
        pick: Quantizes one column.
        work: (columns, rows) float32, not changed. Error feedback: the values to quantize.
            Coordinate descent: the gradient.
        matrix: (columns, columns) float32. Error feedback: row c says how the error of column c is
            shared. Coordinate descent: the block of the Hessian.
        tables: The levels of the block's columns, for `pick`.
        levels: (columns, rows) float32, the levels so far: descend. None: feed errors back.

    Returns:
        Codes (columns, rows) uint8 and levels (columns, rows) float32.
    """
    kernels = _kernels_for(work.device)
    if kernels and kernels.supports(pick, work, tables):
        return kernels.walk(pick, work, matrix, tables, levels)
    return loop(pick, work, matrix, tables, levels)


def _kernels_for(device: torch.device) -> ModuleType | None:
    """Return `column_kernels`: the loop as one launch; ten per column cost more than they do."""
    return usable_kernels("column_kernels", "probe", device)


def loop(
    pick: Pick, work: Tensor, matrix: Tensor, tables: Tables, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `walk_columns` does in plain torch; `pick` may remember what it has seen."""
    work = work.clone()
    values, shares, own = work.unbind(), matrix.unbind(), matrix.diagonal().unbind()
    before = values if levels is None else levels.unbind()
    codes: list[Tensor] = []
    chosen: list[Tensor] = []
    for start in range(0, len(work), STRIP):
        stop = min(start + STRIP, len(work))
        steps = torch.empty_like(work[start:stop])
        for column, step in enumerate(steps, start):
            value = old = before[column]
            if levels is not None:
                value = old - values[column] / own[column]
            code, level = pick(tables, column, value)
            codes.append(code)
            chosen.append(level)
            torch.sub(level, old, out=step)
            after = column + 1
            work[after:stop].addr_(shares[column][after:stop], step)
        work[stop:].addmm_(matrix[start:stop, stop:].T, steps)
    return torch.stack(codes), torch.stack(chosen)
