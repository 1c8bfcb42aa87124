"""Small dense linear algebra, batched."""

import torch
from torch import Tensor

from qtool.core import grouping
from qtool.core.kernel_modules import usable_kernels

RIDGE = 1e-6
"""Relative ridge of least squares: planes of a small group may coincide."""
TINY = 1e-30
"""Keeps an all-zero system solvable: its solution is zero."""


def solve_spd(matrices: Tensor, right: Tensor, *, ridge: float) -> Tensor:
    """Solve many small symmetric positive semidefinite systems by Gauss-Jordan elimination.

    Vectorized over the batch, a few operations per unknown: LAPACK called once per matrix is about
    ten times slower on a hundred thousand 5x5 systems. Without pivoting, which a positive definite
    matrix doesn't need.

    (batch, n, n) and (batch, n) -> (batch, n). The ridge is added to the diagonal, as a fraction of
    its mean; it keeps singular systems solvable.
    """
    n = right.shape[-1]
    kernels = usable_kernels("small_kernels", "try_systems", right.device)
    if kernels is not None and n <= kernels.MOST_UNKNOWNS and right.dtype == torch.float64:
        found: Tensor = kernels.eliminate(matrices, right, ridge=ridge, tiny=TINY)
        return found
    # The batch comes last, so that each step reads contiguous memory.
    a = torch.cat([matrices.permute(1, 2, 0), right.T.unsqueeze(1)], dim=1)  # (n, n + 1, batch)
    diagonal = torch.diagonal(a[:, :n])  # (batch, n), a view
    extra = ridge * diagonal.mean(-1, keepdim=True) + TINY
    diagonal += extra
    floor = extra.squeeze(-1)
    for k in range(n):
        pivot = torch.maximum(a[k, k], floor)  # rounding may push it below zero
        row = a[k] / pivot
        a -= a[:, k : k + 1] * row
        a[k] = row
    return a[:, n].T


def products_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return a product of matrices for each row of a weight.

    On a CPU each of its few elements is a sum over columns, for all rows at once and along memory:
    `einsum` multiplies a small matrix per row, askew, which takes ten to fifteen times as long.

    (columns, m, rows) and (columns, n, rows) -> (rows, m, n).
    """
    if left.is_cuda:
        return torch.einsum("cmr,cnr->rmn", left, right)
    columns = [[(one * other).sum(0) for other in right.unbind(1)] for one in left.unbind(1)]
    return torch.stack([torch.stack(each, -1) for each in columns], 1)


def sums_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return a matrix times a vector for each row of a weight, see `products_of_rows`.

    (columns, m, rows) and (columns, rows) -> (rows, m).
    """
    return products_of_rows(left, right.unsqueeze(1)).squeeze(-1)


def fit_together(basis: Tensor, matrix: Tensor, right: Tensor, size: int) -> Tensor:
    """Return the steps of parameters of several columns that are best together.

    Args:
        basis: (columns, unknowns, rows) float32, what a column's values are linear in.
        matrix: (columns, columns) float32, positive definite, of the quadratic loss.
        right: (columns, rows) float32, minus half its gradient.
        size: Rows that share parameters; the last of them may be fewer.

    Returns:
        (columns, unknowns, row_groups) float32.
    """
    normal, slopes = equations_together(basis, matrix, right, size)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True) + TINY
    solved = torch.linalg.solve(normal, slopes.unsqueeze(-1)).squeeze(-1)
    return solved.T.unflatten(0, basis.shape[:2]).float()


def equations_together(
    basis: Tensor, matrix: Tensor, right: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Return the normal equations that `fit_together` solves.

    The arguments are its own; matrices are (row_groups, columns * unknowns, columns * unknowns)
    float64, right sides (row_groups, columns * unknowns).
    """
    columns, unknowns, _ = basis.shape
    split = grouping.split(basis, size).permute(2, 0, 1, 3).flatten(1, 2)  # (groups, all, size)
    normal = (split @ split.transpose(1, 2)).double().unflatten(1, (columns, unknowns))
    normal = normal.unflatten(3, (columns, unknowns)) * matrix.double().view(columns, 1, columns, 1)
    normal = normal.flatten(3, 4).flatten(1, 2)
    slopes = (split * _repeated(grouping.split(right, size), unknowns)).sum(-1).double()
    return normal, slopes


def _repeated(split: Tensor, unknowns: int) -> Tensor:
    """Return (columns, groups, size) for each unknown of a column: (groups, all, size)."""
    return split.transpose(0, 1).repeat_interleave(unknowns, dim=1)
