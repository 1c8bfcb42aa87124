"""Which decoder a model gets, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.errors import BackendError
from qtool.integrations.transformers.generate import use_runner
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.runtime.backends._choose import load_backend
from qtool.runtime.modules import QuantizedLinear
from qtool.serving import opening
from qtool.serving.batch import Batch
from qtool.serving.decoders import ForwardDecoder, RunnerDecoder
from qtool.serving.opening import DecoderOptions, open_decoder, served_model
from tests.serving.test_batch import by_generate, finished, request


@pytest.mark.parametrize("runs_steps", [True, False])
def test_without_a_card_the_backend_decides_what_runs_it(loaded, runs_steps):
    with use_runner("auto" if runs_steps else "never"):
        decoder = open_decoder(loaded)
    native = load_backend("cpu").why_not(quantized_in(loaded.model).tensor(), loaded.model.device)
    expected = RunnerDecoder if runs_steps and native is None else ForwardDecoder
    assert isinstance(decoder, expected)
    assert (decoder.slots, decoder.max_length) == (4, 512)


def quantized_in(model):
    """Return a quantized linear of a model."""
    return next(module for module in model.modules() if isinstance(module, QuantizedLinear))


def test_the_runner_gives_the_same_tokens(loaded):
    requests = [request(key, most=9) for key in range(7)]
    with use_runner("always"):
        decoder = open_decoder(loaded, DecoderOptions(slots=3, max_length=64))
    assert isinstance(decoder, RunnerDecoder)
    decoder.prepare()
    tokens, _ = finished(Batch(decoder), requests, each=1)
    assert tokens == {one.key: by_generate(loaded.model, one) for one in requests}


@pytest.mark.gpu
def test_on_a_card_it_is_the_runner(chat_checkpoint):
    """Tokens may part where two are as likely as each other, within rounding; most don't."""
    pytest.importorskip("cupy")
    on_card = load_model(Location(chat_checkpoint), device="cuda")
    decoder = open_decoder(on_card, DecoderOptions(slots=4, max_length=64))
    assert isinstance(decoder, RunnerDecoder)
    decoder.prepare()
    requests = [request(key, most=9) for key in range(12)]
    tokens, _ = finished(Batch(decoder), requests, each=2)
    alike = [tokens[one.key] == by_generate(on_card.model, one) for one in requests]
    assert sum(alike) >= 8


def test_a_context_longer_than_the_model_is_refused(loaded):
    for mode in ("always", "never"):
        with use_runner(mode), pytest.raises(BackendError, match="--max-model-len 512 or less"):
            open_decoder(loaded, DecoderOptions(max_length=513))


def test_a_cache_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    shape = SimpleNamespace(num_key_value_heads=8, head_dim=128, dtype=torch.float16)
    norm = SimpleNamespace(device=torch.device("cuda"))
    weights: Any = SimpleNamespace(layers=range(32), shape=shape, final_norm=norm)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (opening.LEFT_FREE + 2**32, 0))
    opening._check_room(weights, 16, 2048)
    with pytest.raises(BackendError, match=r"4.31 GB, and .* Give --max-model-len 2048 or less"):
        opening._check_room(weights, 16, 2056)


@pytest.mark.parametrize("told", [2, [2, 7]])
def test_all_ends_of_the_configuration_are_known(loaded, monkeypatch, told):
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", told)
    assert served_model(loaded).stop_ids == frozenset([told] if isinstance(told, int) else told)
