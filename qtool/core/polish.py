"""Lower tr((Q - W) H (Q - W)^T) further: coordinate descent on codes, least squares on scales.

Sources: coordinate descent as in LNQ (GuidedQuant, arXiv 2505.07004), block Gauss-Seidel for the
parameters; both are exact minimizers of their block, so the loss never rises (a test holds it).
Weights are columns first, (n, rows), see `grids`.
"""

import itertools
from functools import cache, partial

import torch
from torch import Tensor

from qtool.core.error_feedback import STRIP
from qtool.core.graphs import TensorFunction, column_kernels, replay
from qtool.core.grids import Grid, Pick
from qtool.core.linalg import solve_spd

RIDGE = 1e-6
"""Relative ridge of the least squares: planes of a small group may coincide."""


def residual(weight: Tensor, levels: Tensor, hessian: Tensor) -> Tensor:
    """Return H (Q - W), (n, rows): half the gradient of the loss."""
    return hessian @ (levels - weight)


def loss_per_row(weight: Tensor, levels: Tensor, hessian: Tensor) -> Tensor:
    """Return the loss of each row, (rows,)."""
    error = levels - weight
    return ((hessian @ error) * error).sum(0)


def descend_codes(
    grid: Grid, edges: list[int], codes: Tensor, levels: Tensor, gradient: Tensor, hessian: Tensor
) -> None:
    """Run one cycle of coordinate descent over all columns, in place.

    Args:
        grid: Levels of each group.
        edges: Boundaries of the groups, 0 .. n.
        codes: (n, rows) uint8.
        levels: (n, rows) float32, the levels of the codes.
        gradient: (n, rows) float32, `residual` of the levels; kept up to date.
        hessian: (n, n) float32.
    """
    for group, (start, stop) in enumerate(itertools.pairwise(edges)):
        codes[start:stop], chosen = _descend_block(
            grid.pick,
            levels[start:stop],
            gradient[start:stop],
            hessian[start:stop, start:stop],
            grid.tables([group] * (stop - start)),
        )
        step = chosen - levels[start:stop]
        levels[start:stop] = chosen
        gradient.addmm_(hessian[:, start:stop], step)


def _descend_block(
    pick: Pick, levels: Tensor, gradient: Tensor, block: Tensor, tables: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    kernels = column_kernels(levels.device)
    if kernels and kernels.supports(pick, levels, tables):
        return kernels.walk(pick, gradient, block, tables, levels)
    codes, chosen = replay(_descender(pick), levels, gradient, block, *tables)
    return codes, chosen


@cache
def _descender(pick: Pick) -> TensorFunction:
    """Return the column loop for one kind of grid: one object per kind, which names its graph."""
    return partial(_descend, pick)


def _descend(
    pick: Pick, levels: Tensor, gradient: Tensor, block: Tensor, *tables: Tensor
) -> tuple[Tensor, Tensor]:
    local = gradient.clone()
    chosen = torch.empty_like(levels)
    codes = torch.empty(levels.shape, dtype=torch.uint8, device=levels.device)
    for start in range(0, len(levels), STRIP):
        stop = min(start + STRIP, len(levels))
        steps = torch.empty_like(levels[start:stop])
        for column in range(start, stop):
            target = levels[column] - local[column] / block[column, column]
            codes[column], chosen[column] = pick(tables, column, target)
            step = steps[column - start]
            torch.sub(chosen[column], levels[column], out=step)
            local[column + 1 : stop].addr_(block[column, column + 1 : stop], step)
        local[stop:].addmm_(block[start:stop, stop:].T, steps)
    return codes, chosen


def refit(
    grid: Grid, edges: list[int], codes: Tensor, levels: Tensor, gradient: Tensor, hessian: Tensor
) -> None:
    """Move the parameters of each group to the optimum given all others, in place.

    Arguments as for `descend_codes`.
    """
    for group, (start, stop) in enumerate(itertools.pairwise(edges)):
        basis = grid.basis(group, codes[start:stop])  # (unknowns, columns, rows)
        block = hessian[start:stop, start:stop]
        weighted = torch.einsum("cd,udr->ucr", block, basis)
        normal = grid.span.pool(torch.einsum("ucr,vcr->ruv", basis, weighted).double())
        right = grid.span.pool(-torch.einsum("ucr,cr->ru", basis, gradient[start:stop]).double())
        step = solve_spd(normal, right, ridge=RIDGE).T.float()
        grid.set(group, grid.moved(group, step))
        change = grid.values(group, codes[start:stop]) - levels[start:stop]
        levels[start:stop] += change
        gradient.addmm_(hessian[:, start:stop], change)


def polish(  # noqa: PLR0913 - the problem, and three counts
    grid: Grid,
    edges: list[int],
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    *,
    rounds: int,
    cycles: int = 2,
    sweeps: int = 2,
) -> Tensor:
    """Alternate coordinate descent and refits, then round the parameters and settle the codes.

    Args:
        grid: Levels of each group; changed.
        edges: Boundaries of the groups, 0 .. n.
        weight: (n, rows) float32, the original weight.
        codes: (n, rows) uint8; changed.
        hessian: (n, n) float32, damped.
        rounds: How often; zero only rounds and settles.
        cycles: Coordinate descents per round.
        sweeps: Refits per round.

    Returns:
        The levels of the codes, (n, rows) float32, of the rounded parameters.
    """
    levels = all_values(grid, edges, codes)
    for _ in range(rounds):
        gradient = residual(weight, levels, hessian)  # afresh each round: updates drift
        for _ in range(cycles):
            descend_codes(grid, edges, codes, levels, gradient, hessian)
        for _ in range(sweeps):
            refit(grid, edges, codes, levels, gradient, hessian)
    grid.round()
    levels = all_values(grid, edges, codes)
    gradient = residual(weight, levels, hessian)
    descend_codes(grid, edges, codes, levels, gradient, hessian)
    return levels


def all_values(grid: Grid, edges: list[int], codes: Tensor) -> Tensor:
    """Return the levels of all codes, (n, rows) float32."""
    spans = itertools.pairwise(edges)
    parts = [grid.values(k, codes[start:stop]) for k, (start, stop) in enumerate(spans)]
    return torch.cat(parts)
