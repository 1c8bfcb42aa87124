"""The column loop: quantize the columns of one block in order, each moving those that are left.

Error feedback and coordinate descent are the same walk. They differ in what they work on (values to
quantize, or a gradient) and in the matrix that says how a column's step moves the later ones.
Weights are columns first, (columns, rows), see `grids`.
"""

from types import ModuleType

import torch
from torch import Tensor

from qtool.core.grids import Pick, Tables, pick_binary, place_binary
from qtool.core.kernel_modules import usable_kernels
from qtool.core.native.columns import has_native_loop, runs_natively, walk_natively

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
    if work.device.type == "cpu" and has_native_loop() and runs_natively(pick, work, tables):
        return walk_natively(pick, work, matrix, tables, levels)
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
    choose = _Places(tables) if pick is pick_binary else _Codes(pick, tables)
    work = work.clone()
    values, own = work.split(1), matrix.diagonal().unbind()
    before = values if levels is None else levels.split(1)
    found: list[Tensor] = []
    chosen: list[Tensor] = []
    for start in range(0, len(work), STRIP):
        stop = min(start + STRIP, len(work))
        strip, steps = work[start:stop], torch.empty_like(work[start:stop])
        shares = matrix[start:stop, start:stop].triu(1).T.split(1, 1)  # nothing for columns before
        for column, step, share in zip(range(start, stop), steps.split(1), shares, strict=True):
            value = old = before[column]
            if levels is not None:
                value = old - values[column] / own[column]
            code, level = choose(column, value)
            found.append(code)
            chosen.append(level)
            torch.sub(level, old, out=step)
            strip.addmm_(share, step)
        work[stop:].addmm_(matrix[start:stop, stop:].T, steps)
    return choose.codes(torch.cat(found)), torch.cat(chosen)


class _Codes:
    """Quantizes a column as its `Pick` does; all are (1, rows)."""

    def __init__(self, pick: Pick, tables: Tables) -> None:
        self._pick, self._tables = pick, tables

    def __call__(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        codes, levels = self._pick(self._tables, column, values[0])
        return codes.unsqueeze(0), levels.unsqueeze(0)

    def codes(self, found: Tensor) -> Tensor:
        return found


class _Places:
    """Does what `pick_binary` does in half as many operations: codes are read once, at the end."""

    def __init__(self, tables: Tables) -> None:
        self._levels, self._codes, self._middles = tables
        self._above = torch.empty_like(self._middles)

    def __call__(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        del column  # all columns of a block are of one group
        places = place_binary(self._middles, values, self._above)
        return places, self._levels.gather(0, places)

    def codes(self, found: Tensor) -> Tensor:
        return self._codes.gather(0, found)
