"""Low-rank parts of a weight's error, and which layer gets how much rank.

Sources: the weighted form is that of CALDERA and LQER (arXiv 2405.18886, 2402.02446); that the
greedy choice is exact for sums of falling gains is classical (Fox 1966).
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.core.hessian import damp

FULL_SVD = 2048
"""Up to this size singular values are exact; above, the first by random projections (Halko et al.
2011, arXiv 0909.4061)."""
TINY_SHARE = 1e-8
"""Of the first singular value: those below are rounding."""
MORE, POWER_PASSES = 16, 4
"""Of these projections: directions beyond those that are asked for, and power iterations."""


@dataclass(frozen=True, slots=True)
class Directions:
    """The best low-rank parts of a matrix E for inputs x: E x is nearly up[:, :r] @ down[:r] x."""

    energies: Tensor
    """(most,) float32, falling: how much of mean |E x|^2 each takes away."""
    up: Tensor  # (out_features, most) float32
    down: Tensor  # (most, in_features) float32


def best_directions(
    matrix: Tensor, moments: Tensor | None, most: int, damping: float
) -> Directions:
    """Return the best low-rank parts: with H = S S^T those of E S, brought back by S^-1.

    Args:
        matrix: E, (out_features, in_features) float32.
        moments: H, (in_features, in_features) float32, mean of x x^T; None: the identity.
        most: Ranks that are wanted.
        damping: Of H, as part of the mean of its diagonal.
    """
    most = min(most, *matrix.shape)
    factor = None if moments is None else torch.linalg.cholesky(damp(moments, damping))
    left, strengths, right = _svd(matrix if factor is None else matrix @ factor, most)
    roots = strengths.sqrt()
    down = roots[:, None] * right
    if factor is not None:
        down = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    return Directions(strengths.square(), left * roots, down)


def _svd(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.shape
    if min(rows, columns) > FULL_SVD:
        left, strengths, right = torch.svd_lowrank(matrix, most + MORE, niter=POWER_PASSES)
        return left[:, :most], strengths[:most], right.T[:most]
    if rows < columns:
        right, strengths, left = _svd(matrix.T, most)
        return left.T, strengths, right.T
    # On a card ten times as fast as its SVD; squaring costs no digit that float32 has.
    squares, vectors = torch.linalg.eigh(matrix.double().T @ matrix.double())
    strengths = squares.flip(0)[:most].clamp(min=0).sqrt()
    right = vectors.flip(1)[:, :most].T
    left = (
        matrix.double() @ right.T / strengths.clamp(min=float(strengths[0]) * TINY_SHARE + 1e-300)
    )
    return left.float(), strengths.float(), right.float()


def allot_ranks(
    energies: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
    limits: tuple[int, int, int],
) -> dict[str, int]:
    """Return the rank of each layer: what takes away the most for its parameters gets the next.

    Of equal ones it is the layer that has the least.

    Args:
        energies: By layer, (ranks,) what each rank takes away, falling.
        costs: Parameters of one rank of a layer.
        budget: Parameters of all.
        limits: Lowest and highest rank of a layer, and the step between.
    """
    lowest, highest, step = limits
    ranks = {name: min(lowest, len(found)) for name, found in energies.items()}
    left = budget - sum(costs[name] * rank for name, rank in ranks.items())
    waiting: list[tuple[float, int, str]] = []

    def offer(name: str) -> None:
        first, last = ranks[name], min(ranks[name] + step, highest, len(energies[name]))
        if last > first:
            gain = float(energies[name][first:last].sum()) / (costs[name] * (last - first))
            heapq.heappush(waiting, (-gain, first, name))

    for name in energies:
        offer(name)
    while waiting:
        *_, name = heapq.heappop(waiting)
        more = min(step, highest - ranks[name], len(energies[name]) - ranks[name])
        if more * costs[name] <= left:
            ranks[name] += more
            left -= more * costs[name]
            offer(name)
    return ranks
