"""Many small systems of equations at once, as one Triton kernel each.

On a card the solvers wait for launches: eliminating one unknown takes seven, and rounding one
parameter of a group to its best multiple fifteen, for work of microseconds. Here each program takes
some systems, keeps them in registers, and does all of it.

This module imports Triton: it is looked up through `kernel_modules`.
"""

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_UNKNOWNS = 9
SYSTEMS = 32
"""Per program, at most."""
MOST_VALUES = 512
"""Of all systems of a program that rounds, for each thing that it keeps of them."""

_T: TypeAlias = tl.tensor


@triton.jit  # type: ignore[untyped-decorator]
def _solve(  # noqa: PLR0913, PLR0917
    matrices: _T,  # (batch, N, N) float64
    right: _T,  # (batch, N) float64
    out: _T,  # (batch, N) float64
    batch: _T,
    RIDGE: tl.constexpr,
    TINY: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,  # powers of two, at least N and N + 1
    COLUMNS: tl.constexpr,
    SYSTEMS: tl.constexpr,
) -> None:
    """Eliminate as `linalg.solve_spd` does."""
    system = tl.program_id(0) * SYSTEMS + tl.arange(0, SYSTEMS)[None, None, :]
    row = tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, COLUMNS)[None, :, None]
    there = (row < N) & (system < batch)
    square = tl.load(
        matrices + (system * N + row) * N + column, mask=there & (column < N), other=0.0
    )
    last = tl.load(right + system * N + row + column * 0, mask=there & (column == N), other=0.0)
    trace = tl.sum(tl.sum(tl.where(row == column, square, 0.0), axis=0), axis=0)
    floor = trace / N * RIDGE + TINY
    a = square + last + tl.where((row == column) & (row < N), floor[None, None, :], 0.0)
    for k in tl.static_range(N):
        chosen = tl.sum(tl.where(row == k, a, 0.0), axis=0)  # (COLUMNS, SYSTEMS)
        factors = tl.sum(tl.where(column == k, a, 0.0), axis=1)  # (ROWS, SYSTEMS)
        pivot = tl.sum(tl.where(row == k, factors[:, None, :], 0.0), axis=0)  # (1, SYSTEMS)
        scaled = chosen / tl.maximum(pivot, floor[None, :])
        a = tl.where(row == k, scaled[None, :, :], a - factors[:, None, :] * scaled[None, :, :])
    solution = tl.sum(tl.where(column == N, a, 0.0), axis=1)  # (ROWS, SYSTEMS)
    place = tl.arange(0, ROWS)[:, None]
    which = tl.program_id(0) * SYSTEMS + tl.arange(0, SYSTEMS)[None, :]
    tl.store(out + which * N + place, solution, mask=(place < N) & (which < batch))


@triton.jit  # type: ignore[untyped-decorator]
def _round_in_turn(  # noqa: PLR0913, PLR0917
    normal: _T,  # (batch, N, N) float64
    right: _T,  # (batch, N) float64
    old: _T,  # (parameters, batch) float32
    units: _T,  # (N, batch) float32
    lowest: _T,  # (N,) or more, float32: multiples
    highest: _T,
    out: _T,  # (parameters, batch) float32; the first N are written
    batch: _T,
    TINY: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, at least N
    PASSES: tl.constexpr,
    SYSTEMS: tl.constexpr,
) -> None:
    """Do what `round_in_turn` says."""
    system = tl.program_id(0) * SYSTEMS + tl.arange(0, SYSTEMS)
    row = tl.arange(0, ROWS)[:, None]
    inside = system < batch
    there = (row < N) & inside[None, :]
    before = tl.load(old + row * batch + system[None, :], mask=there, other=0.0)
    wished = tl.load(right + system[None, :] * N + row, mask=there, other=0.0)
    own_units = tl.load(units + row * batch + system[None, :], mask=there, other=0.0)
    now = before
    for turn in range(N * PASSES):
        k = turn % N
        unit = tl.sum(tl.where(row == k, own_units, 0.0), axis=0)
        divisor = tl.where(unit > 0.0, unit, float("inf"))
        weights = tl.load(normal + (system[None, :] * N + k) * N + row, mask=there, other=0.0)
        step = (now - before).to(tl.float64)
        slope = tl.sum(tl.where(row == k, wished, 0.0), axis=0) - tl.sum(weights * step, axis=0)
        curvature = tl.sum(tl.where(row == k, weights, 0.0), axis=0) + TINY
        here = tl.sum(tl.where(row == k, now, 0.0), axis=0)
        multiple = tl.div_rn(here + (slope / curvature).to(tl.float32), divisor)
        multiple = tl.maximum(multiple, tl.load(lowest + k))
        multiple = tl.minimum(multiple, tl.load(highest + k))
        multiple = (multiple + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds, ties to even
        value = (multiple * unit).to(tl.float16).to(tl.float32)
        now = tl.where(row == k, value[None, :], now)
    tl.store(out + row * batch + system[None, :], now, mask=there)


def eliminate(matrices: Tensor, right: Tensor, *, ridge: float, tiny: float) -> Tensor:
    """Do what `linalg.solve_spd` does, of float64 systems with at most `MOST_UNKNOWNS`."""
    batch, n = right.shape
    out = torch.empty_like(right, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(right):  # Triton launches on the current device
        _solve[(triton.cdiv(batch, SYSTEMS),)](
            matrices.contiguous(),
            right.contiguous(),
            out,
            batch,
            RIDGE=ridge,
            TINY=tiny,
            N=n,
            ROWS=triton.next_power_of_2(n),
            COLUMNS=triton.next_power_of_2(n + 1),
            SYSTEMS=SYSTEMS,
        )
    return out


def round_in_turn(  # noqa: PLR0913
    normal: Tensor,
    right: Tensor,
    old: Tensor,
    units: Tensor,
    bounds: tuple[Tensor, Tensor],
    *,
    passes: int,
    tiny: float,
) -> Tensor:
    """Do what `multiples.best_in_turn` does.

    Args:
        normal: (batch, unknowns, unknowns) float64.
        right: (batch, unknowns) float64.
        old: (parameters, batch) float32, the unknowns first.
        units: (unknowns, batch) float32.
        bounds: Lowest and highest multiples, (parameters,) float32 each.
        passes: Over all unknowns.
        tiny: Added to the curvatures.
    """
    batch, n = right.shape
    out = old.clone()
    rows = triton.next_power_of_2(n)
    systems = max(1, min(SYSTEMS, MOST_VALUES // rows))
    with torch.cuda.device_of(right):
        _round_in_turn[(triton.cdiv(batch, systems),)](
            normal.contiguous(),
            right.contiguous(),
            old.contiguous(),
            units.contiguous(),
            *bounds,
            out,
            batch,
            TINY=tiny,
            N=n,
            ROWS=rows,
            PASSES=passes,
            SYSTEMS=systems,
        )
    return out


def try_systems(device: torch.device) -> None:
    """Compile and run the smallest case; raises what is amiss."""
    ones = torch.ones(1, 1, 1, dtype=torch.float64, device=device)
    eliminate(ones, ones[0], ridge=0.0, tiny=0.0)
