"""The column loops of error feedback and coordinate descent, each as one Triton kernel.

A column needs about nine tiny operations that depend on each other, so as separate kernels the loop
costs nine launches per column, whatever its size. Rows are independent, though: here each program
takes a few rows of the block, keeps their (columns, rows) working values in registers and walks
over all columns by itself. One launch replaces all of them.

This module imports Triton: only `qtool.core.column_loop` may import it.
"""

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.core.column_grids import pick_columns
from qtool.core.dint import pick_dint
from qtool.core.grids import Pick, Tables, pick_affine, pick_binary

MAX_COLUMNS = 256
HELD_LEVELS = 16
"""More levels per group don't fit in registers; they are searched in memory."""
TILE = 4096
"""Working values per program, at most: 32 for each of the 128 threads."""
ROWS_AT_ONCE = 32
"""Rows per program, at most."""
NUM_WARPS = 4
_GRIDS: dict[Pick, int] = {pick_binary: 0, pick_affine: 1, pick_dint: 2, pick_columns: 3}
"""What the kernel knows grids by."""
_LEVELS_DIM: dict[Pick, int] = {pick_binary: 0, pick_columns: 1}
"""Of tables of levels; others are scales and zero points of each column, and a code."""


_T: TypeAlias = tl.tensor


@triton.jit  # type: ignore[untyped-decorator]
def _tile(table: _T, place: _T, row: _T, count: _T, rows: _T) -> _T:
    """Load (places, rows) of a table (count, rows), zeros beyond it."""
    there = (place[:, None] < count) & (row[None, :] < rows)
    return tl.load(table + place[:, None] * rows + row[None, :], mask=there, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _later(matrix: _T, index: _T, column: _T, columns: _T) -> _T:
    """Load how a column moves those behind it."""
    there = (index > column) & (index < columns)
    return tl.load(matrix + column * columns + index, mask=there, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _descended(
    value: _T, old: _T, diagonal: _T, there: _T, DESCENDS: tl.constexpr
) -> tuple[_T, _T]:
    """Return values to quantize, and what steps are measured from.

    Descending, `value` is the gradient: where the loss is least, and the levels so far.
    """
    before = value
    if DESCENDS:
        before = tl.load(old, mask=there, other=0.0)
        curvature = tl.load(diagonal) + tl.zeros_like(value)
        value = before - tl.div_rn(value, curvature)
    return value, before


@triton.jit  # type: ignore[untyped-decorator]
def _affine(value: _T, scales: _T, zeros: _T, top: _T, here: _T, there: _T) -> tuple[_T, _T]:
    """Return the nearest codes and levels of a column's own grids."""
    scale = tl.load(scales + here, mask=there, other=1.0)
    zero = tl.load(zeros + here, mask=there, other=0.0)
    code = tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, 0.0), tl.load(top))
    code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds, ties to even
    return code.to(tl.int32), (code - zero) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _halved(value: _T, scales: _T, zeros: _T, top: _T, here: _T, there: _T) -> tuple[_T, _T]:
    """Do what `_affine` does where half a step, either way, is a level too."""
    scale = tl.load(scales + here, mask=there, other=1.0)
    zero = tl.load(zeros + here, mask=there, other=0.0)
    last = tl.load(top)
    steps = tl.div_rn(value, scale)
    whole = tl.minimum(tl.maximum(steps, -zero), last - zero)
    whole = (whole + 12582912.0) - 12582912.0
    size = tl.abs(steps)
    is_half = (size >= 0.25) & ((size < 0.75) | (whole == 0.0))  # noqa: PLR2004
    below = tl.where(steps < 0.0, 1.0, 0.0)
    code = tl.where(is_half, last + 1.0 + below, whole + zero)
    return code.to(tl.int32), tl.where(is_half, 0.5 - below, whole) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _of_column(  # noqa: PLR0913, PLR0917 - a kernel's arguments are flat
    value: _T, scales: _T, zeros: _T, top: _T, here: _T, there: _T, GRIDS: tl.constexpr
) -> tuple[_T, _T]:
    """Return the nearest codes and levels of a column's own grids, of either kind."""
    if GRIDS == 2:  # noqa: PLR2004 - a kernel reads no names of its module
        code, level = _halved(value, scales, zeros, top, here, there)
    else:
        code, level = _affine(value, scales, zeros, top, here, there)
    return code, level


@triton.jit  # type: ignore[untyped-decorator]
def _binary(value: _T, place: _T, levels: _T, codes: _T, middles: _T, last: _T) -> tuple[_T, _T]:
    """Return the nearest codes and levels, ties up; there are `last` middles."""
    above = (value[None, :] >= middles) & (place[:, None] < last)
    chosen = place[:, None] == tl.sum(above.to(tl.int32), axis=0)[None, :]
    code = tl.sum(tl.where(chosen, codes, 0), axis=0)
    return code, tl.sum(tl.where(chosen, levels, 0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _searched(  # noqa: PLR0913, PLR0917 - a kernel's arguments are flat
    value: _T, row: _T, rows: _T, there: _T, levels: _T, codes: _T, middles: _T, STEPS: tl.constexpr
) -> tuple[_T, _T]:
    """Do what `_binary` does for 2^STEPS levels, by halving what is left."""
    place = tl.zeros_like(row)
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        middle = tl.load(middles + (place + half - 1) * rows + row, mask=there, other=0.0)
        place = tl.where(value >= middle, place + half, place)
    code = tl.load(codes + place * rows + row, mask=there, other=0).to(tl.int32)
    return code, tl.load(levels + place * rows + row, mask=there, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _own(  # noqa: PLR0913, PLR0917 - a kernel's arguments are flat
    value: _T,
    row: _T,
    rows: _T,
    size: _T,
    column: _T,
    there: _T,
    levels: _T,  # (columns, places, groups of rows), as `codes`; middles: a place less
    codes: _T,
    middles: _T,
    STEPS: tl.constexpr,
) -> tuple[_T, _T]:
    """Do what `_searched` does with the levels of a column, which `size` rows share."""
    group, groups = row // size, tl.cdiv(rows, size)
    first, between = column * groups << STEPS, column * groups * ((1 << STEPS) - 1)
    levels, codes, middles = levels + first, codes + first, middles + between
    return _searched(value, group, groups, there, levels, codes, middles, STEPS)


@triton.jit  # type: ignore[untyped-decorator]
def _held(  # noqa: PLR0913, PLR0917 - a kernel's arguments are flat
    levels: _T, codes: _T, middles: _T, row: _T, rows: _T, count: _T, NUM_LEVELS: tl.constexpr
) -> tuple[_T, _T, _T, _T]:
    """Load the tables of a binary grid: places, levels, codes, and the middles between levels."""
    place = tl.arange(0, NUM_LEVELS)
    level = _tile(levels, place, row, count, rows)
    code = _tile(codes, place, row, count, rows).to(tl.int32)
    return place, level, code, _tile(middles, place, row, count - 1, rows)


@triton.jit  # type: ignore[untyped-decorator]
def _walk(  # noqa: PLR0913, PLR0917 - a kernel's arguments are flat
    work_pointer: tl.tensor,  # (columns, rows): values to quantize; descending: gradient
    old_pointer: tl.tensor,  # (columns, rows): descending: levels so far
    matrix_pointer: tl.tensor,  # (columns, columns)
    first: tl.tensor,  # affine, dint: scales (columns, rows); binary: levels (num_levels, rows)
    second: tl.tensor,  # affine, dint: zero points (columns, rows); binary: codes, likewise
    third: tl.tensor,  # affine, dint: top code (1,); binary: middles (num_levels - 1, rows)
    codes_pointer: tl.tensor,  # (columns, rows) uint8, out
    levels_pointer: tl.tensor,  # (columns, rows), out
    columns: tl.tensor,
    rows: tl.tensor,
    num_levels: tl.tensor,
    size: tl.tensor,  # rows that share levels, where each column has its own
    GRIDS: tl.constexpr,  # of _GRIDS
    DESCENDS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,  # of a tile: powers of two, at least as many as there are
    NUM_LEVELS: tl.constexpr,  # that are held; others are found in STEPS
    STEPS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    there, index = row < rows, tl.arange(0, NUM_COLUMNS)
    work = _tile(work_pointer, index, row, columns, rows)
    # Only binary grids use these; otherwise the compiler drops them.
    place, levels, codes, middles = _held(first, second, third, row, rows, num_levels, NUM_LEVELS)

    for column in range(columns):
        here, square = column * rows + row, column * columns + column
        value = tl.sum(tl.where(index[:, None] == column, work, 0.0), axis=0)
        levels_here, own = old_pointer + here, matrix_pointer + square
        value, old = _descended(value, levels_here, own, there, DESCENDS)
        if GRIDS == 3:  # noqa: PLR2004 - as above
            code, level = _own(value, row, rows, size, column, there, first, second, third, STEPS)
        elif GRIDS > 0:
            code, level = _of_column(value, first, second, third, here, there, GRIDS)
        elif STEPS > 0:
            code, level = _searched(value, row, rows, there, first, second, third, STEPS)
        else:
            code, level = _binary(value, place, levels, codes, middles, num_levels - 1)
        tl.store(codes_pointer + here, code.to(tl.uint8), mask=there)
        tl.store(levels_pointer + here, level, mask=there)
        work += _later(matrix_pointer, index, column, columns)[:, None] * (level - old)[None, :]


def supports(pick: Pick, work: Tensor, tables: Tables) -> bool:
    """Return whether `walk` can do a block: `work` (columns, rows), with its tables for `pick`."""
    dim = _LEVELS_DIM.get(pick)
    whole = dim is None or tables[0].shape[dim].bit_count() == 1  # all signs of all planes
    fits = 0 < len(work) <= MAX_COLUMNS and 0 < work.numel() < 2**31  # offsets are int32
    return pick in _GRIDS and whole and fits and work.dtype == torch.float32


def walk(
    pick: Pick, work: Tensor, matrix: Tensor, tables: Tables, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `column_loop.walk_columns` does, of whose arguments `supports` says yes."""
    columns, rows = work.shape
    work = work.contiguous()
    old = work if levels is None else levels.contiguous()
    first, second, third = (table.contiguous() for table in tables[:3])
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=work.device)
    chosen = torch.empty_like(work)
    dim = _LEVELS_DIM.get(pick)
    tile_columns = max(16, triton.next_power_of_2(columns))
    tile_rows = min(ROWS_AT_ONCE, TILE // tile_columns)
    num_levels = 0 if dim is None else first.shape[dim]
    is_held = num_levels <= HELD_LEVELS and pick is not pick_columns
    with torch.cuda.device_of(work):  # Triton launches on the current device
        _walk[(triton.cdiv(rows, tile_rows),)](
            work,
            old,
            matrix.contiguous(),
            first,
            second,
            third,
            codes,
            chosen,
            columns,
            rows,
            num_levels if is_held else 0,
            int(tables[3]) if pick is pick_columns else 1,
            GRIDS=_GRIDS[pick],
            DESCENDS=levels is not None,
            NUM_COLUMNS=tile_columns,
            NUM_LEVELS=max(num_levels, 1) if is_held else 1,
            STEPS=0 if is_held else num_levels.bit_length() - 1,
            NUM_ROWS=tile_rows,
            num_warps=NUM_WARPS,
        )
    return codes, chosen


def probe(device: torch.device) -> None:
    """Build and run one small kernel; raises what Triton raises if it can't."""
    ones = torch.ones(1, 1, device=device)
    walk(pick_affine, ones, ones, (ones, ones, ones[0]))
