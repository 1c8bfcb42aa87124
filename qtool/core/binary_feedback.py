"""Hessian-aware binary coding (BCQ-H): levels and codes of each group found under feedback.

Source: the inner loop of BPDQ (arXiv 2602.04163), started from several grids and selected per row;
docs/log.md has what each part is worth. Weights are columns first, (n, rows), see `grids`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.core.column_grids import ColumnGrid
from qtool.core.error_feedback import encode_columns, feed_forward, scaled_errors
from qtool.core.grids import BinaryGrid
from qtool.core.linalg import RIDGE, products_of_rows, solve_spd, sums_of_rows
from qtool.core.native.groups import group_natively, takes_group


def solve_groups(
    weight: Tensor,
    upper: Tensor,
    edges: list[int],
    starts: Sequence[Tensor],
    *,
    offset: bool,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Find the levels and codes of all groups, in order, with error feedback.

    Args:
        weight: (n, rows) float32 in the order in which columns are solved; overwritten.
        upper: (n, n), H^-1 = upper^T upper in the same order.
        edges: Boundaries of the groups in that order.
        starts: Parameters to start from, each (num_groups, num_bits + 1, rows).
        offset: False: the offset stays zero.
        iterations: How often codes and levels alternate within a group.

    Returns:
        Codes (n, rows) uint8 and parameters (num_groups, num_bits + 1, rows) float32.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    parameters = torch.empty_like(starts[0])
    numbers = {start: number for number, start in enumerate(edges[:-1])}

    def solve(start: int, stop: int, block: Tensor, factor: Tensor) -> Tensor:
        group = numbers[start]
        first = torch.stack([parts[group] for parts in starts])
        found = solve_group(block, factor, first, offset=offset, iterations=iterations)
        codes[start:stop], parameters[group], errors = found
        return errors

    feed_forward(weight, upper, edges, solve)
    return codes, parameters


def solve_columns(
    weight: Tensor, upper: Tensor, grid: ColumnGrid, order: Tensor, *, iterations: int
) -> Tensor:
    """Find the levels and codes of a layer whose groups run along out_features.

    A group never crosses columns, but under feedback the levels of one column decide what the next
    ones are to hold: those of a block are fitted together.

    Args:
        weight: (n, rows) float32 in the order in which columns are solved; overwritten.
        upper: (n, n) in the same order.
        grid: Levels of each column in the original order; adapted.
        order: (n,) original column at each position.
        iterations: How often codes and levels alternate within a block.

    Returns:
        Codes (n, rows) uint8, in the order of `weight`.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    edges = [*range(0, len(weight), grid.at_once), len(weight)]

    def solve(start: int, stop: int, block: Tensor, factor: Tensor) -> Tensor:
        found = _solve_block(block, factor, grid, order[start:stop], iterations)
        codes[start:stop], errors = found
        return errors

    feed_forward(weight, upper, edges, solve)
    return codes


def _solve_block(
    weight: Tensor, upper: Tensor, grid: ColumnGrid, columns: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Alternate codes and levels of columns; keep the best of each group of rows in the grid.

    Returns:
        Codes (columns, rows) uint8, and scaled errors.
    """
    matrix, span, groups = torch.cholesky_inverse(upper, upper=True), grid.span, columns.tolist()
    best_parameters = grid.parameters[columns]
    best_codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    best_errors = torch.zeros_like(weight)
    best_loss = torch.full_like(best_parameters[0, 0], torch.inf)  # (row_groups,)
    for _ in range(iterations):
        codes, levels = encode_columns(weight, upper, grid.tables(groups), grid.pick)
        for refits in (False, True):
            if refits:
                grid.refit(columns, codes, matrix, matrix @ (levels - weight))
                levels = grid.values_of(columns, codes)
            errors = scaled_errors(weight, levels, upper)
            loss = span.pool(errors.square().sum(0))
            better = loss < best_loss
            rows = span.expand(better)
            best_loss = torch.where(better, loss, best_loss)
            best_codes = torch.where(rows, codes, best_codes)
            best_errors = torch.where(rows, errors, best_errors)
            best_parameters = torch.where(better, grid.parameters[columns], best_parameters)
    grid.put(columns, best_parameters)
    return best_codes, best_errors


def solve_group(
    weight: Tensor, upper: Tensor, starts: Tensor, *, offset: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the codes and levels of one group of columns, the fastest way that the device has.

    Args:
        weight: (columns, rows) float32.
        upper: (columns, columns), the group's part of the factor.
        starts: Parameters to start from, (starts, num_bits + 1, rows) float32.
        offset: False: the offset stays zero.
        iterations: How often codes and levels alternate.

    Returns:
        Of the best that each row has met: codes (columns, rows) uint8, parameters
        (num_bits + 1, rows) float32 and scaled errors (columns, rows).
    """
    if takes_group(len(weight), starts.shape[1] - 1, weight):
        return group_natively(weight, upper, starts, offset=offset, iterations=iterations)
    return group_by_torch(weight, upper, starts, offset=offset, iterations=iterations)


def group_by_torch(
    weight: Tensor, upper: Tensor, starts: Tensor, *, offset: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `solve_group` does in plain torch, all starts side by side."""
    first = starts.transpose(0, 1).flatten(1)  # (unknowns, starts * rows)
    found = _solve_starts(
        weight.repeat(1, len(starts)), upper, first, offset=offset, iterations=iterations
    )
    best, errors = _best_start(found, len(starts))
    return *best, errors


def _solve_starts(
    weight: Tensor, upper: Tensor, parameters: Tensor, *, offset: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate codes and whitened least squares; return the best of both, and scaled errors."""
    # Products with the inverse take a third of what solving with the factor does every time.
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    whitening = torch.linalg.solve_triangular(upper.T, eye, upper=False)
    whitened = whitening @ weight
    grid = BinaryGrid(parameters.unsqueeze(0), offset=offset)
    best_codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    best_parameters = parameters.clone()
    best_errors = torch.zeros_like(weight)
    best_loss = torch.full_like(parameters[0], torch.inf)
    for _ in range(iterations):
        codes, levels = encode_columns(weight, upper, grid.tables([0]), grid.pick)
        errors = whitening @ (weight - levels)
        fitted = _whitened_fit(grid, codes, whitening, whitened)
        improved = BinaryGrid(fitted.unsqueeze(0), offset=offset)
        refined = whitening @ (weight - improved.values(0, codes))
        for candidate, candidate_errors in ((grid, errors), (improved, refined)):
            loss = candidate_errors.square().sum(0)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_codes = torch.where(better, codes, best_codes)
            best_parameters = torch.where(better, candidate.parameters[0], best_parameters)
            best_errors = torch.where(better, candidate_errors, best_errors)
        grid = improved
    return best_codes, best_parameters, best_errors


def _whitened_fit(grid: BinaryGrid, codes: Tensor, whitening: Tensor, whitened: Tensor) -> Tensor:
    """Return the parameters that minimize the scaled errors with the codes fixed."""
    basis = grid.basis(0, codes)  # (unknowns, columns, rows)
    unknowns, columns, rows = basis.shape
    flat = basis.transpose(0, 1).reshape(columns, -1)
    white = (whitening @ flat).view(columns, unknowns, rows)
    normal = products_of_rows(white, white).double()
    right = sums_of_rows(white, whitened).double()
    solved = solve_spd(normal, right, ridge=RIDGE).T.float()
    return torch.nn.functional.pad(solved, (0, 0, 0, grid.parameters.shape[1] - unknowns))


def _best_start(
    found: tuple[Tensor, Tensor, Tensor], num_starts: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Choose the start of each row by the norm of its scaled errors."""
    codes, parameters, errors = (part.unflatten(1, (num_starts, -1)) for part in found)
    winner = errors.square().sum(0).argmin(0)  # (rows,)

    def pick(part: Tensor) -> Tensor:
        index = winner.expand(part.shape[0], 1, -1)
        return part.gather(1, index).squeeze(1)

    return (pick(codes), pick(parameters)), pick(errors)
