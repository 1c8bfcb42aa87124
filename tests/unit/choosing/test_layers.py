"""Allocation of choices, against trying all of them."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.choosing.layers import Margin, PricedLayer, allocate, margins
from qtool.errors import RecipeError
from tests.helpers import run_python

SIZES = st.one_of(st.integers(1, 10), st.integers(1, 2**40))
COSTS = st.floats(0, 10, allow_subnormal=False) | st.floats(1e-9, 1e-6)


@st.composite
def layers(draw) -> list[PricedLayer]:
    found = []
    for group in range(draw(st.integers(1, 4))):
        choices = draw(st.integers(1, 4))
        for member in range(draw(st.integers(1, 2))):
            sizes, costs = (
                tuple(draw(st.lists(values, min_size=choices, max_size=choices)))
                for values in (SIZES, COSTS)
            )
            found.append(PricedLayer(f"{group}.{member}", str(group), sizes, costs))
    return found


def by_group(found: list[PricedLayer]) -> dict[str, list[PricedLayer]]:
    return {
        group: [layer for layer in found if layer.group == group]
        for group in dict.fromkeys(layer.group for layer in found)
    }


def every_way(found: list[PricedLayer]) -> list[tuple[int, float]]:
    """Return bytes and price of all allocations."""
    groups = by_group(found)
    ways = product(*(range(len(members[0].prices)) for members in groups.values()))
    return [
        (
            sum(l.num_bytes[i] for i, m in zip(way, groups.values(), strict=True) for l in m),  # noqa: E741
            sum(l.prices[i] for i, m in zip(way, groups.values(), strict=True) for l in m),  # noqa: E741
        )
        for way in ways
    ]


@given(layers(), st.floats(0, 1))
def test_nothing_within_the_budget_is_cheaper(found, share):
    ways = every_way(found)
    least, most = min(ways)[0], max(ways)[0]
    budget = least + int(share * (most - least))
    chosen = allocate(found, budget)
    taken = sum(layer.num_bytes[chosen[layer.name]] for layer in found)
    price = sum(layer.prices[chosen[layer.name]] for layer in found)
    best = min(price for size, price in ways if size <= budget)
    largest = max(price for layer in found for price in layer.prices)
    assert taken <= budget
    assert price <= best + 1e-9 * largest


@given(layers())
def test_layers_of_a_group_take_the_same_choice_and_the_answer_is_always_the_same(found):
    budget = max(every_way(found))[0] // 2 + min(every_way(found))[0]
    chosen = allocate(found, budget)
    assert allocate(found, budget) == chosen
    for members in by_group(found).values():
        assert len({chosen[layer.name] for layer in members}) == 1


def test_a_budget_below_the_smallest_choices_is_refused():
    found = [PricedLayer("a", "a", (4, 8), (1.0, 0.5)), PricedLayer("b", "b", (6,), (0.0,))]
    assert allocate(found, 10) == {"a": 0, "b": 0}
    assert allocate(found, 14) == {"a": 1, "b": 0}
    with pytest.raises(RecipeError, match="take 10 bytes, and the budget is 9"):
        allocate(found, 9)


def test_many_layers_take_no_time():
    found = [
        PricedLayer(str(n), str(n), (200, 300, 400), (16.0 / (1 + n), 4.0 / (1 + n), 1.0 / (1 + n)))
        for n in range(320)
    ]
    chosen = allocate(found, 320 * 300)
    assert [chosen[str(n)] for n in (0, 319)] == [2, 0]
    assert sum(found[n].num_bytes[chosen[str(n)]] for n in range(320)) <= 320 * 300


HARD = """
import random
from qtool.choosing.layers import PricedLayer, allocate
rng = random.Random(13)
layers = []
for n in range(120):
    size, worth = rng.choice([5, 3, 16, 8]), rng.lognormvariate(0, 1)
    costs = tuple(worth * size * 4.0**-b * rng.uniform(0.6, 1.4) for b in (3, 4, 5))
    layers.append(PricedLayer(str(n), str(n), tuple(size * 9216 * b for b in (3, 4, 5)), costs))
least, most = (sum(layer.num_bytes[place] for layer in layers) for place in (0, 2))
print("before")
allocate(layers, int(least + (most - least) * 0.31))
print("after")
"""
"""A problem at which HiGHS 1.12 prints a line, though it was told not to."""


def test_the_solver_prints_nothing():
    assert run_python(HARD) == "before\nafter\n"


def test_margins_are_slopes_to_the_best_neighbours():
    mib = 2**20
    found = [
        PricedLayer("q", "qk", (mib, 2 * mib, 3 * mib), (9.0, 4.0, 3.0)),
        PricedLayer("k", "qk", (mib, 2 * mib, 3 * mib), (1.0, 1.0, 1.0)),
        PricedLayer("o", "o", (mib, mib), (2.0, 1.0)),
    ]
    worth = margins(found, {"q": 1, "k": 1, "o": 1})
    assert worth["q"] == worth["k"]
    assert worth["q"] == Margin(gain=0.5, loss=2.5)
    assert worth["o"] == Margin(gain=None, loss=None)
