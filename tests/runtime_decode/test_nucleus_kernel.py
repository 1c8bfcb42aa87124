"""The kernel that draws tokens, its own text run on the CPU, against its definition in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.core.nucleus import sample_nucleus
from qtool.runtime.backends.cuda.decode_ops import MOST_TOKENS_DRAWN_FROM, KernelOps
from qtool.runtime.backends.cuda.launch import Card
from tests.kernels.host import Recorder

OPS = KernelOps(Recorder(), Card(multiprocessors=2, shared_bytes=48 * 1024))
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


def drawn(logits, options):
    got = OPS.draw(logits, logits.argmax(-1), options)
    assert got is not None
    return got


def defined(logits, options):
    temperatures, top_p, numbers, likely = options.split(1, dim=1)
    best = logits.argmax(-1)
    return torch.where(
        likely[:, 0] > 0, best, sample_nucleus(logits, best, temperatures, top_p, numbers)
    )


def options_of(rows, temperature, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(rows, generator=generator, dtype=torch.float64)
    columns = (torch.full((rows,), float(each)).double() for each in (temperature, top_p))
    return torch.stack([*columns, numbers, torch.zeros(rows).double()], 1)


@settings(deadline=None, max_examples=40)
@given(
    size=st.sampled_from([1, 7, 8, 250, 1003, 4096, 9001]),
    rows=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    dtype=DTYPES,
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([1e-8, 0.01, 0.7, 1.0, 50.0]),
    top_p=st.sampled_from([0.0, 1e-6, 0.5, 0.9012, 0.999, 1.0]),
)
def test_tokens_are_those_of_the_definition(
    size, rows, seed, dtype, spread, ties, temperature, top_p
):
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread
    logits = (logits.round() if ties else logits).to(dtype)
    options = options_of(rows, temperature, top_p, seed)
    assert torch.equal(drawn(logits, options), defined(logits, options))


def test_a_number_is_drawn_as_often_as_in_float64():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).half() * 3
    numbers = (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    options = options_of(128, 0.8, 0.9, 0)
    options[:, 2] = numbers
    counts = torch.bincount(drawn(logits.expand(128, -1).contiguous(), options), minlength=300)
    scores, order = logits[0].double().sort(descending=True, stable=True)
    probabilities = (scores / 0.8).softmax(-1)
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < 0.9)
    expected = torch.zeros(300).double().scatter(0, order, kept / kept.sum())
    assert bool(((counts - 128 * expected).abs() < 1 + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_vocabulary_zeros_of_both_signs_and_tokens_that_cannot_be(dtype):
    logits = torch.randn(3, 40_008, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    logits[:, ::3], logits[:, 1::300], logits[:, 2::300] = -torch.inf, 0.0, -0.0
    logits[0, 5::7] = torch.nan
    logits[0, 4::7] = -torch.nan
    options = options_of(3, 1.0, 0.9501, 3)
    logits[0, logits[0].isnan()] = -torch.inf  # NaN would be the likeliest
    assert torch.equal(drawn(logits, options), defined(logits, options))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_logits_that_are_no_numbers_give_tokens_all_the_same(value, top_p):
    for among in (value, 1.0):
        logits = torch.full((3, 300), value, dtype=torch.float16)
        logits[:, 7] = among
        options = options_of(3, 1.0, top_p, 0)
        options[:, 2] = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
        tokens = drawn(logits, options)
        assert bool(((tokens >= 0) & (tokens < 300)).all())


def test_rows_that_want_the_likeliest_get_it_and_a_second_draw_is_the_same():
    logits = torch.randn(4, 1003, generator=torch.Generator().manual_seed(2)).half()
    options = options_of(4, 0.9, 0.8, 1)
    options[1::2, 3] = 1.0
    first = drawn(logits, options)
    assert first[1::2].tolist() == logits.argmax(-1)[1::2].tolist()
    assert torch.equal(first, defined(logits, options))
    assert torch.equal(drawn(logits, options), first)


def test_what_the_kernel_does_not_draw_from_is_left_to_torch():
    for logits in (torch.zeros(1, 10), torch.zeros(1, MOST_TOKENS_DRAWN_FROM + 1).half()):
        options = options_of(1, 1.0, 1.0, 0)
        assert OPS.draw(logits, logits.argmax(-1), options) is None
