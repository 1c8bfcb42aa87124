"""Tokens are drawn as their probabilities say, by numbers of the request alone."""

import pytest
import torch

from qtool.serving.sampling import Sampler, next_tokens
from qtool.serving.tokens import SamplingOptions

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, float("-inf")])


def frequencies(draws=1000, **options):
    chosen = []
    for first in range(0, draws, 250):
        seeds = range(first, min(first + 250, draws))
        samplers = [Sampler(SamplingOptions(seed=seed, **options)) for seed in seeds]
        logits = LOGITS.expand(len(samplers), -1)
        chosen.append(next_tokens(logits, logits.argmax(-1), samplers))
    return torch.bincount(torch.cat(chosen), minlength=len(LOGITS)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_frequencies_are_the_probabilities(temperature, top_p):
    expected = (LOGITS / temperature).softmax(-1)
    got = frequencies(temperature=temperature, top_p=top_p)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    assert got[5] == 0


def test_top_p_keeps_the_likeliest_that_together_have_it():
    # 0.64, 0.24, 0.09, ...: two reach 0.7
    probabilities = LOGITS.softmax(-1)
    got = frequencies(top_p=0.7)
    kept = probabilities * torch.tensor([1, 0, 0, 0, 1, 0])
    torch.testing.assert_close(got, kept / kept.sum(), rtol=0, atol=0.05)
    assert frequencies(top_p=1e-6, draws=50)[4] == 1


def test_temperature_zero_is_the_likeliest_also_beside_others():
    logits = LOGITS.expand(2, -1)
    options = [SamplingOptions(temperature=0), SamplingOptions(temperature=2.0, seed=3)]
    for _ in range(20):
        chosen = next_tokens(logits, logits.argmax(-1), [Sampler(one) for one in options])
        assert chosen[0] == 4


def test_very_small_temperatures_and_ties_are_sound():
    assert frequencies(temperature=1e-8, draws=50)[4] == 1
    logits = torch.zeros(1, 7)
    for seed in range(50):
        (token,) = next_tokens(logits, logits.argmax(-1), [Sampler(SamplingOptions(seed=seed))])
        assert 0 <= token < 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("other", [0.0, 0.5, 1.0])
def test_who_else_is_in_the_batch_changes_nothing(other, dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 300).to(dtype)

    def first_tokens(rows, options):
        sampler = Sampler(SamplingOptions(seed=4, top_p=1.0))
        beside = Sampler(SamplingOptions(seed=5, **options))
        chosen = [
            next_tokens(logits[:rows], logits[:rows].argmax(-1), [sampler, beside][:rows])
            for _ in range(20)
        ]
        return [int(each[0]) for each in chosen]

    assert first_tokens(1, {}) == first_tokens(2, {"top_p": 0.9, "temperature": other})


def test_a_seed_below_zero_is_not_the_one_above():
    numbers = {Sampler(SamplingOptions(seed=seed)).draw() for seed in (-2, -1, 0, 1, 2)}
    assert len(numbers) == 5
