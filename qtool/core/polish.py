"""Lower tr((Q - W) H (Q - W)^T) further: coordinate descent on codes, least squares on scales.

Sources: coordinate descent as in LNQ (GuidedQuant, arXiv 2505.07004), block Gauss-Seidel for the
parameters; both are exact minimizers of their block, so the loss never rises (a test holds it).
Weights are columns first, (n, rows), see `grids`.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.core import grouping
from qtool.core.column_loop import walk_columns
from qtool.core.grids import AffineGrid, Grid, within_factor_two
from qtool.core.linalg import RIDGE, TINY, solve_spd

CYCLES, SWEEPS = 2, 2
"""Coordinate descents, and refits, per round."""
COLUMNS_AT_ONCE = 64
"""Single-column groups that are walked and refitted together."""


def residual(weight: Tensor, levels: Tensor, hessian: Tensor) -> Tensor:
    """Return H (Q - W), (n, rows): half the gradient of the loss."""
    return hessian @ (levels - weight)


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
    for start, stop, groups in column_blocks(grid, edges):
        codes[start:stop], chosen = walk_columns(
            grid.pick,
            gradient[start:stop],
            hessian[start:stop, start:stop],
            grid.tables(groups),
            levels[start:stop],
        )
        step = chosen - levels[start:stop]
        levels[start:stop] = chosen
        gradient.addmm_(hessian[:, start:stop], step)


def column_blocks(grid: Grid, edges: list[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield runs of columns that are walked together: first, end, group of each column.

    A run is a group; groups of a single column (those along out_features) are taken together where
    the grid has tables for that, because a column alone is too little work.
    """
    spans = list(itertools.pairwise(edges))
    if grid.span.size == 1 or not isinstance(grid, AffineGrid):
        yield from ((start, stop, [k] * (stop - start)) for k, (start, stop) in enumerate(spans))
        return
    for start in range(0, len(spans), COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, len(spans))
        yield start, stop, list(range(start, stop))


def refit(
    grid: Grid, edges: list[int], codes: Tensor, levels: Tensor, gradient: Tensor, hessian: Tensor
) -> None:
    """Move the parameters of each group to the optimum given all others, in place.

    Arguments as for `descend_codes`.
    """
    if isinstance(grid, AffineGrid) and grid.span.size > 1:
        for start, stop, _ in column_blocks(grid, edges):
            _refit_columns(grid, start, stop, codes, levels, gradient, hessian)
        return
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


def _refit_columns(  # noqa: PLR0913, PLR0917 - a block of columns, and what `refit` gets
    grid: AffineGrid,
    start: int,
    stop: int,
    codes: Tensor,
    levels: Tensor,
    gradient: Tensor,
    hessian: Tensor,
) -> None:
    """Move the scales of single-column groups, those of a block together, to their optimum."""
    zeros = grid.span.expand(grid.zero_points[start:stop])
    basis = codes[start:stop].float() - zeros  # (columns, rows)
    split = grouping.split(basis, grid.span.size)  # (columns, row_groups, size)
    products = torch.einsum("cgs,dgs->gcd", split, split).double()
    normal = products * hessian[start:stop, start:stop].double()  # (row_groups, columns, columns)
    right = grid.span.pool(-(basis * gradient[start:stop]).T).double()  # (row_groups, columns)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True) + TINY
    solved = torch.linalg.solve(normal, right.unsqueeze(-1)).squeeze(-1)
    old = grid.scales[start:stop]
    step = within_factor_two(old, old + solved.T.float()) - old
    # Inside the bounds the step is the minimum; cut to them it may lead uphill.
    moved = step.T.double()
    change = torch.einsum("gc,gcd,gd->g", moved, normal, moved) - 2 * (moved * right).sum(-1)
    step *= (change < 0).float()
    grid.scales[start:stop] = old + step
    difference = grid.span.expand(grid.scales[start:stop]) * basis - levels[start:stop]
    levels[start:stop] += difference
    gradient.addmm_(hessian[:, start:stop], difference)


def polish(
    grid: Grid, edges: list[int], weight: Tensor, codes: Tensor, hessian: Tensor, *, rounds: int
) -> Tensor:
    """Alternate coordinate descent and refits, then round the parameters and settle the codes.

    Args:
        grid: Levels of each group; changed.
        edges: Boundaries of the groups, 0 .. n.
        weight: (n, rows) float32, the original weight.
        codes: (n, rows) uint8; changed.
        hessian: (n, n) float32, damped.
        rounds: How often; zero only rounds and settles.

    Returns:
        The levels of the codes, (n, rows) float32, of the rounded parameters.
    """
    levels = all_values(grid, edges, codes)
    for _ in range(rounds):
        gradient = residual(weight, levels, hessian)  # afresh each round: updates drift
        for _ in range(CYCLES):
            descend_codes(grid, edges, codes, levels, gradient, hessian)
        for _ in range(SWEEPS):
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
