"""Lower tr((Q - W) H (Q - W)^T) further: coordinate descent on codes, least squares on scales.

Sources: coordinate descent as in LNQ (GuidedQuant, arXiv 2505.07004), block Gauss-Seidel for the
parameters; both are exact minimizers of their block, so the loss never rises (a test holds it).
Weights are columns first, (n, rows), see `grids`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core import grouping
from qtool.core.column_grids import ColumnGrid
from qtool.core.column_loop import walk_columns
from qtool.core.grids import AffineGrid, BinaryGrid, Grid, within_factor_two
from qtool.core.linalg import RIDGE, TINY, products_of_rows, sums_of_rows
from qtool.core.native.groups import equations_natively, takes_group

CYCLES, SWEEPS = 2, 2
"""Coordinate descents, and refits, per round."""
COLUMNS_AT_ONCE = 64
"""Single-column groups that are walked and refitted together."""


def residual(weight: Tensor, levels: Tensor, hessian: Tensor) -> Tensor:
    """Return H (Q - W), (n, rows): half the gradient of the loss."""
    return hessian @ (levels - weight)


@dataclass(slots=True)
class Descent:
    """A layer on its way down; each step changes it in place."""

    grid: Grid
    edges: list[int]
    """Boundaries of the groups, 0 .. n."""
    codes: Tensor  # (n, rows) uint8
    levels: Tensor  # (n, rows) float32, of the codes
    gradient: Tensor  # (n, rows) float32, `residual` of the levels; kept up to date
    hessian: Tensor  # (n, n) float32, damped

    def descend_codes(self) -> None:
        """Run one cycle of coordinate descent over all columns."""
        for here, groups in self._blocks():
            levels, matrix = self.levels[here], self.hessian[here, here]
            self.codes[here], chosen = walk_columns(
                self.grid.pick, self.gradient[here], matrix, self.grid.tables(groups), levels
            )
            step = chosen - levels
            self.levels[here] = chosen
            self.gradient.addmm_(self.hessian[:, here], step)

    def refit(self) -> None:
        """Move the parameters of each group to the optimum given all others."""
        grid = self.grid
        if isinstance(grid, ColumnGrid):
            for here, groups in self._blocks():
                columns, matrix = _index(groups, self.codes), self.hessian[here, here]
                grid.refit(columns, self.codes[here], matrix, self.gradient[here])
                self._move(here, grid.values_of(columns, self.codes[here]))
            return
        if isinstance(grid, AffineGrid) and grid.span.size > 1:
            for here, _ in self._blocks():
                self._move(here, self._refitted(grid, here))
            return
        for group, here in enumerate(itertools.starmap(slice, itertools.pairwise(self.edges))):
            normal, right = self._equations(group, here)
            grid.set(group, grid.moved(group, grid.span.pool(normal), grid.span.pool(-right)))
            self._move(here, grid.values(group, self.codes[here]))

    def _blocks(self) -> Iterator[tuple[slice, list[int]]]:
        """Yield runs of columns that are walked together, with the group of each column.

        A run is a group; groups of a single column (those along out_features) are taken together
        where the grid has tables for that, because a column alone is too little work.
        """
        spans = list(itertools.pairwise(self.edges))
        of_columns = isinstance(self.grid, ColumnGrid | AffineGrid)
        if self.grid.span.size == 1 or not of_columns:
            for group, (start, stop) in enumerate(spans):
                yield slice(start, stop), [group] * (stop - start)
            return
        count = self.grid.at_once if isinstance(self.grid, ColumnGrid) else COLUMNS_AT_ONCE
        for start in range(0, len(spans), count):
            stop = min(start + count, len(spans))
            yield slice(start, stop), list(range(start, stop))

    def _equations(self, group: int, here: slice) -> tuple[Tensor, Tensor]:
        """Return the normal equations of a group for each row, and the gradient's part: float64."""
        grid, codes, matrix = self.grid, self.codes[here], self.hessian[here, here]
        gradient = self.gradient[here]
        if isinstance(grid, BinaryGrid):
            num_bits = grid.parameters.shape[1] - 1
            if takes_group(len(codes), num_bits, gradient):
                return equations_natively(codes, matrix, gradient, num_bits, offset=grid.offset)
        basis = grid.basis(group, codes)  # (unknowns, columns, rows)
        weighted = torch.einsum("cd,udr->ucr", matrix, basis)
        basis, weighted = basis.transpose(0, 1), weighted.transpose(0, 1)
        products = products_of_rows(basis, weighted)
        return products.double(), sums_of_rows(basis, gradient).double()

    def _move(self, here: slice, values: Tensor) -> None:
        """Replace the levels of some columns, whose codes stay."""
        change = values - self.levels[here]
        self.levels[here] += change
        self.gradient.addmm_(self.hessian[:, here], change)

    def _refitted(self, grid: AffineGrid, here: slice) -> Tensor:
        """Move the scales of single-column groups, those of a block together, to their optimum."""
        zeros = grid.span.expand(grid.zero_points[here])
        basis = grid.units(self.codes[here], zeros)  # (columns, rows)
        split = grouping.split(basis, grid.span.size)  # (columns, row_groups, size)
        products = torch.einsum("cgs,dgs->gcd", split, split).double()
        normal = products * self.hessian[here, here].double()  # (row_groups, columns, columns)
        right = grid.span.pool(-(basis * self.gradient[here]).T).double()  # (row_groups, columns)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(-1, keepdim=True) + TINY
        solved = torch.linalg.solve(normal, right.unsqueeze(-1)).squeeze(-1)
        old = grid.scales[here]
        step = within_factor_two(old, old + solved.T.float()) - old
        # Inside the bounds the step is the minimum; cut to them it may lead uphill.
        moved = step.T.double()
        change = torch.einsum("gc,gcd,gd->g", moved, normal, moved) - 2 * (moved * right).sum(-1)
        step *= (change < 0).float()
        grid.scales[here] = old + step
        return grid.span.expand(grid.scales[here]) * basis


def _index(groups: list[int], like: Tensor) -> Tensor:
    return torch.tensor(groups, device=like.device)


def polish(
    grid: Grid, edges: list[int], weight: Tensor, codes: Tensor, hessian: Tensor, *, rounds: int
) -> None:
    """Alternate coordinate descent and refits, then round the parameters and settle the codes.

    Args:
        grid: Levels of each group; changed.
        edges: Boundaries of the groups, 0 .. n.
        weight: (n, rows) float32, the original weight.
        codes: (n, rows) uint8; changed.
        hessian: (n, n) float32, damped.
        rounds: How often; zero only rounds and settles.
    """
    levels = all_values(grid, edges, codes)
    for _ in range(rounds):
        # The gradient is taken afresh each round: updates drift.
        descent = Descent(grid, edges, codes, levels, residual(weight, levels, hessian), hessian)
        for _ in range(CYCLES):
            descent.descend_codes()
        for _ in range(SWEEPS):
            descent.refit()
    grid.round()
    levels = all_values(grid, edges, codes)
    Descent(grid, edges, codes, levels, residual(weight, levels, hessian), hessian).descend_codes()


def all_values(grid: Grid, edges: list[int], codes: Tensor) -> Tensor:
    """Return the levels of all codes, (n, rows) float32."""
    if isinstance(grid, ColumnGrid):
        every = torch.arange(len(codes), device=codes.device).split(grid.at_once)
        return torch.cat([grid.values_of(columns, codes[columns]) for columns in every])
    spans = itertools.pairwise(edges)
    parts = [grid.values(k, codes[start:stop]) for k, (start, stop) in enumerate(spans)]
    return torch.cat(parts)
