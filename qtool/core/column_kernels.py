"""The column loops of error feedback and coordinate descent, each as one Triton kernel.

A column needs about nine tiny operations that depend on each other, so as separate kernels the loop
costs nine launches per column, whatever its size. Rows are independent, though: here each program
takes a few rows of the block, keeps their (columns, rows) working values in registers and walks
over all columns by itself. One launch replaces all of them.

This module imports Triton: only `qtool.core.column_loop` may import it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.core.grids import Pick, pick_affine, pick_binary

MAX_COLUMNS = 256
MAX_LEVELS = 16
"""More levels per group don't fit in registers."""
TILE = 4096
"""Working values per program, at most: 32 for each of the 128 threads."""
TILE_ROWS = 32
"""Rows per program, at most."""
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _walk(  # noqa: PLR0913, PLR0917 - a kernel's arguments are flat
    work_pointer: tl.tensor,  # (columns, rows): values to quantize; descending: gradient
    old_pointer: tl.tensor,  # (columns, rows): descending: levels so far
    matrix_pointer: tl.tensor,  # (columns, columns)
    first_pointer: tl.tensor,  # affine: scales (columns, rows); binary: levels (num_levels, rows)
    second_pointer: tl.tensor,  # affine: zero points (columns, rows); binary: codes, likewise
    third_pointer: tl.tensor,  # affine: highest code (1,); binary: middles (num_levels - 1, rows)
    codes_pointer: tl.tensor,  # (columns, rows) uint8, out
    levels_pointer: tl.tensor,  # (columns, rows), out
    columns: tl.tensor,
    rows: tl.tensor,
    num_levels: tl.tensor,
    IS_AFFINE: tl.constexpr,
    DESCENDS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,  # of a tile: powers of two, at least as many as there are
    NUM_LEVELS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    row_there = row < rows
    index = tl.arange(0, NUM_COLUMNS)
    work = tl.load(
        work_pointer + index[:, None] * rows + row[None, :],
        mask=(index[:, None] < columns) & row_there[None, :],
        other=0.0,
    )
    # Only binary grids use these; otherwise the compiler drops them.
    place = tl.arange(0, NUM_LEVELS)
    cell = place[:, None] * rows + row[None, :]
    there = (place[:, None] < num_levels) & row_there[None, :]
    middle_there = (place[:, None] < num_levels - 1) & row_there[None, :]
    table_levels = tl.load(first_pointer + cell, mask=there, other=0.0)
    table_codes = tl.load(second_pointer + cell, mask=there, other=0).to(tl.int32)
    middles = tl.load(third_pointer + cell, mask=middle_there, other=0.0)

    for column in range(columns):
        here = column * rows + row
        later = (index > column) & (index < columns)
        shares = tl.load(matrix_pointer + column * columns + index, mask=later, other=0.0)
        value = tl.sum(tl.where(index[:, None] == column, work, 0.0), axis=0)
        if DESCENDS:
            old = tl.load(old_pointer + here, mask=row_there, other=0.0)
            diagonal = tl.load(matrix_pointer + column * columns + column)
            value = old - tl.div_rn(value, diagonal + tl.zeros_like(value))
        else:
            old = value

        if IS_AFFINE:
            scale = tl.load(first_pointer + here, mask=row_there, other=1.0)
            zero = tl.load(second_pointer + here, mask=row_there, other=0.0)
            code = tl.div_rn(value, scale) + zero
            code = tl.minimum(tl.maximum(code, 0.0), tl.load(third_pointer))
            code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds, ties to even
            level = (code - zero) * scale
            stored = code.to(tl.int32)
        else:
            above = (value[None, :] >= middles) & middle_there
            chosen = place[:, None] == tl.sum(above.to(tl.int32), axis=0)[None, :]
            level = tl.sum(tl.where(chosen, table_levels, 0.0), axis=0)
            stored = tl.sum(tl.where(chosen, table_codes, 0), axis=0)

        tl.store(codes_pointer + here, stored.to(tl.uint8), mask=row_there)
        tl.store(levels_pointer + here, level, mask=row_there)
        work += shares[:, None] * (level - old)[None, :]


def supports(pick: Pick, work: Tensor, tables: tuple[Tensor, ...]) -> bool:
    """Return whether `walk` can do a block.

    Args:
        pick: Kind of the grid.
        work: (columns, rows).
        tables: Its tables for `pick`.
    """
    binary = pick is pick_binary and len(tables[0]) <= MAX_LEVELS
    fits = 0 < len(work) <= MAX_COLUMNS and 0 < work.numel() < 2**31  # offsets are int32
    return (binary or pick is pick_affine) and fits and work.dtype == torch.float32


def walk(
    pick: Pick,
    work: Tensor,
    matrix: Tensor,
    tables: tuple[Tensor, ...],
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block in order; each one moves those that are left.

    Args:
        pick: Kind of the grid; see `supports`.
        work: (columns, rows) float32, not changed. Error feedback: the values to quantize.
            Coordinate descent: the gradient.
        matrix: (columns, columns) float32. Error feedback: row c says how the error of column c
            is shared. Coordinate descent: the block of the Hessian.
        tables: The levels of the block, for `pick`.
        levels: (columns, rows) float32, the levels so far: descend. None: feed errors back.

    Returns:
        Codes (columns, rows) uint8 and levels (columns, rows) float32.
    """
    columns, rows = work.shape
    work = work.contiguous()
    old = work if levels is None else levels.contiguous()
    first, second, third = (table.contiguous() for table in tables)
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=work.device)
    chosen = torch.empty_like(work)
    is_affine = pick is pick_affine
    tile_columns = max(16, triton.next_power_of_2(columns))
    tile_rows = min(TILE_ROWS, TILE // tile_columns)
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
            0 if is_affine else len(first),
            IS_AFFINE=is_affine,
            DESCENDS=levels is not None,
            NUM_COLUMNS=tile_columns,
            NUM_LEVELS=1 if is_affine else triton.next_power_of_2(len(first)),
            NUM_ROWS=tile_rows,
            num_warps=NUM_WARPS,
        )
    return codes, chosen


def probe(device: torch.device) -> None:
    """Build and run one small kernel; raises what Triton raises if it can't."""
    ones = torch.ones(1, 1, device=device)
    walk(pick_affine, ones, ones, (ones, ones, ones[0]))
