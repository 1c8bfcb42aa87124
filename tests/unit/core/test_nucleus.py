"""The nucleus of a radix search is that of a sorted vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core.nucleus import sample_nucleus

DRAWS = 32


def sorted_nucleus(logits, temperature, top_p):
    """Return the probabilities of (vocab_size,) float64, and how near a mass is to top_p."""
    scores, order = logits.double().sort(descending=True, stable=True)
    probabilities = (scores / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * ((before < top_p) | (top_p >= 1))
    found = torch.zeros_like(kept).scatter(0, order, kept / kept.sum())
    return found, (before - top_p).abs().min()


def sampled(logits, temperature, top_p, draws):
    """Return tokens (draws,)."""
    rows = logits.expand(len(draws), -1)

    def column(value):
        return torch.full((len(draws), 1), value, dtype=torch.float64)

    return sample_nucleus(
        rows, rows.argmax(-1), column(temperature), column(top_p), draws[:, None].double()
    )


def check_as_sorted(logits, temperature, top_p):
    expected, nearest = sorted_nucleus(logits, temperature, top_p)
    if nearest <= 1e-6:
        return  # rounding decides
    draws = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    found = torch.bincount(sampled(logits, temperature, top_p, draws), minlength=len(logits))
    # a token's draws are one interval, so its count is right to less than one
    assert bool(((found - expected * DRAWS).abs() < 1 + 1e-6).all())
    assert not bool(found[expected == 0].any())


@settings(deadline=None, max_examples=40)
@given(
    size=st.sampled_from([1, 5, 255, 256, 257, 700]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9012, 0.999, 1.0]),
)
def test_tokens_are_those_of_the_sorted_vocabulary(
    size, seed, dtype, spread, ties, temperature, top_p
):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    check_as_sorted((logits.round() if ties else logits).to(dtype), temperature, top_p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_large_vocabulary_with_zeros_of_both_signs_and_tokens_that_cannot_be(dtype):
    logits = torch.randn(40_007, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    logits[::3], logits[1::300], logits[2::300] = -torch.inf, 0.0, -0.0
    check_as_sorted(logits, 1.0, 0.9501)


def test_of_tokens_as_likely_the_first_are_kept():
    draws = torch.linspace(0, 1 - 2**-53, DRAWS, dtype=torch.float64)
    assert set(sampled(torch.zeros(10), 1.0, 0.41, draws).tolist()) == {0, 1, 2, 3, 4}
    assert set(sampled(torch.zeros(10), 1.0, 1.0, draws).tolist()) == set(range(10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_give_tokens_all_the_same(value, dtype):
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for top_p, among in ((0.5, value), (1.0, value), (0.0, 1.0)):
        logits = torch.full((300,), value, dtype=dtype)
        logits[7] = among
        tokens = sampled(logits, 1.0, top_p, draws)
        assert bool(((tokens >= 0) & (tokens < 300)).all())
