"""Percentiles and their errors, against what is known of them."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.spread import PERCENTS, estimated_mean, root_mean_square, spread_of

VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60)


@given(VALUES)
def test_spread_is_ordered_and_within_the_sample(values):
    found = spread_of(torch.tensor(values, dtype=torch.float64))
    assert (found.minimum, found.maximum) == (min(values), max(values))
    percentiles = [found.percentiles[f"{percent:g}"].value for percent in PERCENTS]
    assert percentiles == sorted(percentiles, reverse=True)
    assert found.percentiles["50"].value == pytest.approx(statistics.median(values), abs=1e-6)
    assert found.minimum <= percentiles[-1] <= percentiles[0] <= found.maximum
    for one in found.percentiles.values():
        assert one.standard_error is None or one.standard_error >= 0


@given(VALUES)
def test_mean_and_its_error_are_the_textbooks(values):
    found = estimated_mean(torch.tensor(values, dtype=torch.float64))
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert found.value == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    assert found.standard_error == pytest.approx(error, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("percent", "share"), [("50", 0.5), ("90", 0.9), ("99", 0.99)])
def test_error_of_a_percentile_is_how_much_it_varies_over_samples(percent, share):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 2000, generator=generator, dtype=torch.float64)
    found = [spread_of(sample).percentiles[percent] for sample in samples]
    varies = statistics.stdev(one.value for one in found)
    said = statistics.fmean(one.standard_error or 0 for one in found)
    assert said == pytest.approx(varies, rel=0.2)
    normal = statistics.NormalDist().inv_cdf(share)
    assert statistics.fmean(one.value for one in found) == pytest.approx(normal, abs=0.02)


def test_percentile_beyond_the_sample_has_no_error():
    found = spread_of(torch.arange(100, dtype=torch.float64)).percentiles
    assert found["99.9"].standard_error is None
    assert found["0.1"].standard_error is None
    assert found["90"].standard_error == pytest.approx(3, abs=0.6)


def test_root_mean_square_has_the_error_of_the_delta_method():
    generator = torch.Generator().manual_seed(1)
    samples = 3 * torch.randn(300, 500, generator=generator, dtype=torch.float64)
    found = [root_mean_square(sample) for sample in samples]
    assert statistics.fmean(one.value for one in found) == pytest.approx(3, rel=0.01)
    varies = statistics.stdev(one.value for one in found)
    assert statistics.fmean(one.standard_error or 0 for one in found) == pytest.approx(
        varies, rel=0.15
    )
    nothing = root_mean_square(torch.zeros(3))
    assert (nothing.value, nothing.standard_error) == (0, 0)
