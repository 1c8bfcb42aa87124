"""The int8 key-value cache: what it holds, and that it holds the same whoever fills it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import BackendError
from qtool.integrations.transformers import generate
from qtool.integrations.transformers.generate import accelerate, use_runner
from qtool.integrations.transformers.int8_cache import keep_as_wanted
from qtool.integrations.transformers.sampling import SharedRunner
from qtool.runtime.decode.cache import (
    bytes_per_token,
    dequantized_rows,
    quantized_rows,
    use_kv_cache,
    wanted_kv_cache,
)
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS
from tests.runtime_decode.models import build, prompt
from tests.runtime_decode.test_generate import GREEDY
from tests.runtime_decode.test_runner import stepwise

NUMBERS = st.floats(-60000, 60000, width=16)


@given(st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_number_is_half_a_step_from_what_is_held_of_it(rows):
    x = torch.tensor(rows, dtype=torch.float16)
    codes, scales = quantized_rows(x)
    assert scales.dtype == torch.float32 and codes.dtype == torch.int8
    assert int(codes.min()) >= -127
    held = codes.double() * scales.double()[:, None]
    assert bool(((held - x.double()).abs() <= 0.5001 * scales.double()[:, None]).all())
    assert torch.equal(scales == 0, (x == 0).all(-1))
    again, same = quantized_rows(dequantized_rows(codes, scales, torch.float32))
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scales, rtol=1e-6, atol=0)


def test_what_is_no_number_stays_none():
    for odd in (torch.nan, torch.inf):
        held = dequantized_rows(*quantized_rows(torch.tensor([[1.0, odd]])), torch.float32)
        assert bool(held.isnan().all())


def rms(x):
    return float(x.pow(2).mean().sqrt())


@pytest.mark.parametrize("kind", ["llama", "qwen2-bias", "qwen3-norms"])
@pytest.mark.parametrize("length", [1, 10, 29])
@torch.no_grad()
def test_prompts_and_steps_see_what_the_cache_holds(kind, length):
    """Transformers reads all tokens at once, over keys and values as an int8 cache has them."""
    model, ids = build(kind), prompt(2, 30)
    plain = model(ids).logits[:, length - 1 :]
    with use_kv_cache("int8"):
        keep_as_wanted(model)
    right = model(ids).logits[:, length - 1 :]
    runner = DecodeRunner(weights_of(model), OPS, max_length=30, batch=2, kv_cache="int8")
    got = stepwise(runner, ids, length)
    assert rms(plain - right) > 0
    assert rms(got - right) < 0.3 * rms(plain - right)  # a rounding may turn a code


@torch.no_grad()
def test_a_larger_cache_goes_on_with_the_same_bits():
    weights, ids = weights_of(build("llama")), prompt(2, 20)
    small, large = (
        DecodeRunner(weights, OPS, max_length=size, batch=2, kv_cache="int8") for size in (12, 24)
    )
    for runner in (small, large):
        runner.prefill(ids[:, :12])
    grown = small.grown(24)
    for index in range(12, 20):
        assert torch.equal(grown.step(ids[:, index]), large.step(ids[:, index]))


def test_a_cache_takes_what_is_foretold():
    weights = weights_of(build("llama", torch.float16))
    taken = {}
    for kind in ("auto", "int8"):
        runner = DecodeRunner(weights, OPS, max_length=32, batch=3, kv_cache=kind)
        buffers = runner.state.cached().values()
        taken[kind] = sum(one.numel() * one.element_size() for one in buffers)
        assert taken[kind] == 3 * 32 * bytes_per_token(weights, kind)
    head_dim = weights.shape.head_dim
    assert taken["int8"] * 2 * head_dim == taken["auto"] * (head_dim + 4)


def kind_made_for(model):
    decoder = generate._MADE[model].decoder
    assert isinstance(decoder, SharedRunner)
    assert decoder.runner is not None
    return decoder.runner.kv_cache


def test_generate_keeps_keys_and_values_as_wanted(monkeypatch):
    model, ids = accelerate(build("llama")), prompt(2, 9)
    kinds = []
    with use_runner("always"):
        for wanted in (None, "int8", "auto"):
            with use_kv_cache(wanted):
                model.generate(ids, pad_token_id=0, **GREEDY)
            kinds.append(kind_made_for(model))
        monkeypatch.setenv("QTOOL_KV_CACHE", "int8")
        model.generate(ids, pad_token_id=0, **GREEDY)
        kinds.append(kind_made_for(model))
    assert kinds == ["auto", "int8", "auto", "int8"]


def test_padding_changes_no_token_of_an_int8_cache():
    model, ids = accelerate(build("llama")), prompt(2, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    with use_runner("always"), use_kv_cache("int8"):
        both = model.generate(ids * mask, attention_mask=mask, pad_token_id=0, **GREEDY)
        for row, begin in enumerate((0, 4)):
            alone = model.generate(ids[row : row + 1, begin:], pad_token_id=0, **GREEDY)
            assert torch.equal(both[row, 9:29], alone[0, 9 - begin :][:20])


def test_unknown_caches_and_foreign_attention_are_refused(monkeypatch):
    monkeypatch.setenv("QTOOL_KV_CACHE", "int4")
    with pytest.raises(BackendError, match=r"no key-value cache 'int4'. Take auto or int8"):
        wanted_kv_cache()
    model = build("llama")
    model.set_attn_implementation("eager")
    with use_kv_cache("int8"), pytest.raises(BackendError, match=r"'eager', not 'sdpa'"):
        keep_as_wanted(model)
