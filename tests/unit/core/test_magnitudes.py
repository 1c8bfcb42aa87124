"""Counts of magnitudes: what they say of values that nobody kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.magnitudes import NARROWEST, Magnitudes

seeds = st.integers(0, 2**16)


def counted(*batches):
    seen = Magnitudes.none(torch.device("cpu"))
    for batch in batches:
        seen.add(batch)
    return seen


def draw(seed, count=500):
    """Return float16 numbers with a heavy tail: counts tell all of them apart."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (values**3).half()


@given(seed=seeds, percent=st.floats(51, 100))
def test_a_percentile_is_that_of_the_sorted_values(seed, percent):
    values = draw(seed)
    ordered = values.abs().double().sort().values
    found = counted(values).percentile(percent)
    share = float((ordered <= found).double().mean())
    below = float((ordered < found).double().mean())
    assert share >= percent / 100 - 1e-9
    assert below < percent / 100


@given(first=seeds, second=seeds)
def test_counts_add_up(first, second):
    a, b = draw(first), draw(second).float().view(10, 50)
    both = counted(a, b)
    assert torch.equal(both.counts, counted(a).merged(counted(b)).counts)
    assert both.largest() == float(max(a.abs().max(), b.abs().max()))


def test_the_best_range_has_the_least_error_and_cuts_outliers_at_few_bits():
    values = torch.cat([draw(0, 4000), torch.tensor([200.0]).half()])
    largest = float(values.abs().max())

    def error(covered, top):
        step = covered / top
        codes = (values.double() / step).round().clamp(-top, top)
        return float((values.double() - codes * step).square().sum())

    for top in (7, 127):
        best = counted(values).best_range(top)
        tried = [largest * NARROWEST ** (i / 50) for i in range(51)]
        assert error(best, top) <= 1.02 * min(error(covered, top) for covered in tried)
        assert best < largest or top > 7


@pytest.mark.parametrize("batches", [(), (torch.zeros(3, 4),)])
def test_of_nothing_and_of_zeros_all_is_zero(batches):
    seen = counted(*batches)
    assert seen.largest() == seen.percentile(99) == seen.best_range(7) == 0
