"""Who gets how many bits: the paper's rule and the allocator, on tables of numbers."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.choosing.rows import cluster_widths, share_bits
from qtool.errors import RecipeError
from qtool.recipe.rows import cluster_sizes

SIZES = st.integers(1, 400), st.integers(1, 8), st.floats(1, 12)


@given(*SIZES)
def test_sizes_add_up_and_are_the_papers(rows, clusters, ratio):
    sizes = cluster_sizes(rows, clusters, ratio)
    total = sum(ratio**k for k in range(clusters))
    assert sum(sizes) == rows and len(sizes) == clusters and min(sizes) >= 0
    for index, size in enumerate(sizes[:-1]):
        assert size == min(round(rows * ratio**index / total), rows - sum(sizes[:index]))


@pytest.mark.parametrize(("ratio", "average"), [(1, 2.50), (2, 1.73), (4, 1.32), (8, 1.14)])
def test_averages_are_those_that_the_paper_reports(ratio, average):
    bits = cluster_widths(torch.rand(10_000), torch.zeros(10_000).bool(), clusters=4, ratio=ratio)
    assert bits.double().mean() == pytest.approx(average, abs=0.005)


@given(*SIZES, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_rule_is_monotone_in_frequency(rows, clusters, ratio, min_bits, seed):
    clusters = min(clusters, 9 - min_bits)
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.randint(0, 9, (rows,), generator=generator).float()
    protected = torch.rand(rows, generator=generator) < 0.1
    bits = cluster_widths(frequency, protected, clusters=clusters, ratio=ratio, min_bits=min_bits)
    order = frequency.argsort(descending=True, stable=True)
    for group in (order[protected[order]], order[~protected[order]]):
        assert bool((bits[group].long().diff() <= 0).all())
    if protected.any() and not protected.all():
        assert bits[protected].min() >= bits[~protected].max()
    sizes = cluster_sizes(rows, clusters, ratio)
    assert (
        bits.long().bincount(minlength=10).flip(0).tolist()[10 - clusters - min_bits :][:clusters]
        == sizes
    )


LOSSES = st.integers(1, 4).flatmap(
    lambda choices: st.lists(
        st.lists(st.floats(0, 10), min_size=choices, max_size=choices), min_size=1, max_size=5
    )
)


def convex(drops: list[float]) -> list[float]:
    """Return losses that fall by less and less."""
    ordered = sorted(drops, reverse=True)
    return [sum(ordered[index:]) for index in range(len(ordered) + 1)]


@given(LOSSES, st.integers(0, 25))
def test_no_allocation_is_better_where_losses_are_convex(drops, spare):
    losses = torch.tensor([convex(row) for row in drops], dtype=torch.float64)
    rows, choices = losses.shape
    widths = range(1, choices + 1)
    budget = rows + spare
    chosen = share_bits(losses, widths, budget, torch.zeros(rows, dtype=torch.int64))
    every = [one for one in product(range(choices), repeat=rows) if sum(one) <= spare]
    best = min(sum(float(losses[row, at]) for row, at in enumerate(one)) for one in every)
    assert int((chosen + 1).sum()) <= budget
    assert float(losses.gather(1, chosen.unsqueeze(1)).sum()) == pytest.approx(best, abs=1e-9)


@given(LOSSES, st.floats(0, 60), st.data())
def test_budget_is_never_exceeded_and_what_is_spent_is_spent_well(drops, spare, data):
    """Losses may rise, and costs be uneven: of all allocations as cheap none is better on hulls."""
    losses = torch.tensor(drops, dtype=torch.float64)
    rows, choices = losses.shape
    steps = data.draw(st.lists(st.integers(1, 9), min_size=choices, max_size=choices))
    costs = [sum(steps[: index + 1]) for index in range(choices)]
    lowest = torch.tensor(
        data.draw(st.lists(st.integers(0, choices - 1), min_size=rows, max_size=rows))
    )
    budget = sum(costs[low] for low in lowest.tolist()) + spare
    chosen = share_bits(losses, costs, budget, lowest)
    price = torch.tensor(costs)
    spent = int(price[chosen].sum())
    assert spent <= budget and bool((chosen >= lowest).all())
    reached = float(losses.gather(1, chosen.unsqueeze(1)).sum())
    for one in product(*(range(low, choices) for low in lowest.tolist())):
        if sum(costs[at] for at in one) <= spent:
            assert reached <= sum(drops[row][at] for row, at in enumerate(one)) + 1e-9
    again = share_bits(losses, costs, budget, lowest)
    assert torch.equal(chosen, again)


def test_rows_that_cost_more_than_the_budget_are_refused():
    with pytest.raises(RecipeError, match="cost 6 at the least, and the budget is 5"):
        share_bits(torch.ones(3, 2), [1, 2], 5, torch.ones(3, dtype=torch.int64))


def test_rows_that_gain_nothing_stay_lowest():
    chosen = share_bits(torch.ones(3, 3), [1, 2, 3], 9, torch.zeros(3, dtype=torch.int64))
    assert chosen.tolist() == [0, 0, 0]
