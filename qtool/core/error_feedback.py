"""Error feedback: quantize column by column and let the columns that are left absorb the error.

Source: GPTQ (arXiv 2210.17323). With H^-1 = U^T U, the error of column c divided by U[c, c] is
spread over the later columns along U[c, c:]. The loop is that of `column_loop`; weights are columns
first, (n, rows), see `grids`.

Identity (a test holds it): with E the scaled errors, Y - Q = U^T E for the weights Y that went in,
so the loss tr((W - Q) H (W - Q)^T) is the squared norm of E.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from qtool.core.column_loop import walk_columns
from qtool.core.grids import Pick, Tables

SolveBlock = Callable[[int, int, Tensor, Tensor], Tensor]
"""(start, stop, weights of the block (columns, rows), its part of U) -> scaled errors E."""


def encode_columns(
    weight: Tensor, upper: Tensor, tables: Tables, pick: Pick
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block in order, with feedback inside it.

    Args:
        weight: (columns, rows) float32; not changed.
        upper: (columns, columns), the block's part of the factor U.
        tables: The levels of the block's columns, for `pick`.
        pick: Quantizes one column; it may fit the levels to the values that it sees.

    Returns:
        Codes (columns, rows) uint8 and levels (columns, rows) float32.
    """
    shares = upper / upper.diagonal().unsqueeze(1)  # row c: how later columns share c's error
    return walk_columns(pick, weight, shares, tables)


def scaled_errors(weight: Tensor, levels: Tensor, upper: Tensor) -> Tensor:
    """Return E with weight - levels = U^T E: (columns, rows)."""
    return torch.linalg.solve_triangular(upper.T, weight - levels, upper=False)


def feed_forward(weight: Tensor, upper: Tensor, edges: list[int], solve: SolveBlock) -> None:
    """Solve blocks of columns in order and pass each one's error on to all later columns.

    Args:
        weight: (n, rows) float32; on return holds the compensated values that were quantized.
        upper: (n, n), H^-1 = U^T U.
        edges: Block boundaries, 0 .. n.
        solve: Quantizes one block and returns its scaled errors E.
    """
    for start, stop in itertools.pairwise(edges):
        block = upper[start:stop, start:stop]
        errors = solve(start, stop, weight[start:stop], block)
        if stop < len(weight):
            weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
