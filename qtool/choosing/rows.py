"""How many bits each row of an embedding or a head gets: pure functions.

Two rules. Clusters of rows by frequency are those of Chung et al. 2020 (Extremely Low Bit
Transformer, arXiv 2009.07453, Algorithm 1). The allocator minimises a sum of losses, one per row,
under a budget: on the convex hulls of the rows' losses the steps of least loss per bit first are
optimal (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.errors import RecipeError
from qtool.recipe.rows import cluster_sizes


def cluster_widths(
    frequency: Tensor, protected: Tensor, *, clusters: int, ratio: float, min_bits: int = 1
) -> Tensor:
    """Return the bits of each row by the paper's rule, (rows,) uint8.

    Args:
        frequency: (rows,) of the tokens; the most frequent get `min_bits + clusters - 1` bits, the
            next cluster one less, and so on.
        protected: (rows,) bool; these come first, whatever their frequency.
        clusters: How many widths there are.
        ratio: How many times as many rows a cluster has as the one before.
        min_bits: Of the last cluster; 1 in the paper.
    """
    by_frequency = frequency.argsort(descending=True, stable=True)
    order = by_frequency[(~protected[by_frequency]).to(torch.uint8).argsort(stable=True)]
    sizes = cluster_sizes(len(frequency), clusters, ratio)
    widths = torch.arange(min_bits + clusters - 1, min_bits - 1, -1, dtype=torch.uint8)
    bits = torch.empty(len(frequency), dtype=torch.uint8)
    bits[order.cpu()] = widths.repeat_interleave(torch.tensor(sizes))
    return bits


def share_bits(losses: Tensor, costs: Sequence[float], budget: float, lowest: Tensor) -> Tensor:
    """Return the choice of each row that makes the sum of losses least under a budget.

    Exact where it spends the whole budget; where the next step doesn't fit, exact for what it
    spends. Ties go to the first row. The budget is never exceeded.

    Args:
        losses: (rows, choices) float64 of each row and choice.
        costs: Of each choice, ascending, in the unit of the budget.
        budget: Of all rows together.
        lowest: (rows,) int64, the choice below which a row doesn't go.

    Returns:
        (rows,) int64, the choices.

    Raises:
        RecipeError: the lowest choices alone exceed the budget.
    """
    price = torch.tensor(costs, dtype=torch.float64)
    left = budget - float(price[lowest].sum())
    if left < 0:
        raise RecipeError(
            f"The rows cost {budget - left:.0f} at the least, and the budget is {budget:.0f}. Give "
            "more, or allow fewer bits."
        )
    rows, ends, gains, steps = _hull_steps(losses.double().cpu(), price, lowest)
    order = gains.argsort(descending=True, stable=True)
    taken = order[: int((steps[order].cumsum(0) <= left + 1e-9 * budget).sum())]
    return lowest.scatter_reduce(0, rows[taken], ends[taken], "amax")


def _hull_steps(
    losses: Tensor, price: Tensor, lowest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the steps along the lower convex hull of each row that lower its loss.

    They are (steps,) tensors: row, choice after it, loss saved per cost, and cost; the steps of a
    row come in order, and save less and less.
    """
    rows, here = torch.arange(len(losses)), lowest
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while len(rows):
        now, cost = losses[rows].gather(1, here.unsqueeze(1)), price[here].unsqueeze(1)
        further = torch.arange(losses.shape[1]) > here.unsqueeze(1)
        slopes = ((now - losses[rows]) / (price - cost)).where(further, -torch.inf)
        best, end = slopes.flip(1).max(1)  # of equal ones the furthest
        end = losses.shape[1] - 1 - end
        goes = best > 0
        rows, here, end, best = rows[goes], here[goes], end[goes], best[goes]
        found.append((rows, end, best, price[end] - price[here]))
        here = end
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]
