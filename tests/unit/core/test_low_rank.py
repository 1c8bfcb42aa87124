"""Ranks and where they begin: errors fall by what is promised, and budgets hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import low_rank
from qtool.core.low_rank import allot_ranks, best_directions
from tests.helpers import normal

X = normal(400, 24, seed=1) @ torch.diag(torch.logspace(0, -2, 24))
MOMENTS = X.T @ X / len(X)


def left_over(matrix, found, rank):
    rest = matrix - found.up[:, :rank] @ found.down[:rank]
    return float((X @ rest.T).double().square().sum() / len(X))


@pytest.mark.parametrize("shape", [(16, 24), (40, 24)])
def test_energies_are_what_each_rank_takes_away(shape):
    matrix = normal(*shape)
    found = best_directions(matrix, MOMENTS, 16, 1e-8)
    full = best_directions(matrix, MOMENTS, 24, 1e-8)
    errors = [left_over(matrix, found, rank) for rank in range(17)]
    for rank in range(16):
        expected = float(found.energies[rank])
        assert abs(errors[rank] - errors[rank + 1] - expected) < 1e-3 * errors[0]
    assert left_over(matrix, full, 24) < 1e-4 * errors[0]
    plain = best_directions(matrix, None, 4, 1e-8)
    assert left_over(matrix, found, 4) < 0.9 * left_over(matrix, plain, 4)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 100)), min_size=1, max_size=6),
    st.integers(0, 4),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_ranks_keep_budget_and_bounds(layers, lowest, more, step, average):
    highest = lowest + more
    energies = {
        str(n): torch.sort(normal(length, seed=n).square(), descending=True).values
        for n, (length, _) in enumerate(layers)
    }
    costs = {str(n): cost for n, (_, cost) in enumerate(layers)}
    budget = max(average, lowest) * sum(costs.values())
    ranks = allot_ranks(energies, costs, budget, (lowest, highest, step))
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
    for name, rank in ranks.items():
        most = min(highest, len(energies[name]))
        assert min(lowest, most) <= rank <= most
    spent = sum(costs[name] * rank for name, rank in ranks.items())
    for name, rank in ranks.items():  # nobody who could have more has less
        more_of = min(step, highest - rank, len(energies[name]) - rank)
        assert more_of <= 0 or spent + more_of * costs[name] > budget


def test_large_matrices_are_projected_to_nearly_the_same(monkeypatch):
    matrix = normal(60, 24, seed=2)
    exact = best_directions(matrix, MOMENTS, 4, 1e-3)
    monkeypatch.setattr(low_rank, "FULL_SVD", 8)
    torch.manual_seed(0)
    near = best_directions(matrix, MOMENTS, 4, 1e-3)
    torch.testing.assert_close(near.energies, exact.energies, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near.up @ near.down, exact.up @ exact.down, rtol=1e-2, atol=2e-2)


def test_equal_spectra_give_equal_ranks_and_more_energy_more():
    equal = {name: torch.ones(8) for name in "abc"}
    costs = dict.fromkeys("abc", 10)
    assert allot_ranks(equal, costs, 90, (0, 8, 1)) == dict.fromkeys("abc", 3)
    unlike = {**equal, "b": torch.full((8,), 5.0)}
    assert allot_ranks(unlike, costs, 90, (1, 8, 1)) == {"a": 1, "b": 7, "c": 1}
