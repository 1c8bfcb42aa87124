"""`generate` through the runner against transformers' own loop."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.integrations.transformers import generate, sampling
from qtool.integrations.transformers.generate import accelerate, use_runner
from qtool.integrations.transformers.sampling import SharedRunner
from qtool.runtime.backends._choose import load_backend, use_backend
from qtool.runtime.decode import read_model as llama
from qtool.runtime.decode.torch_ops import OPS
from tests import families
from tests.runtime_decode.models import build, prompt

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
SAMPLED: dict[str, Any] = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 1.5}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "one token": {**GREEDY, "max_new_tokens": 1},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.3},
    "stops": {**GREEDY, "eos_token_id": list(range(3, 13))},
    "sampled": SAMPLED,
    "top p": {**SAMPLED, "top_p": 0.7},
    "sampled stops": {**SAMPLED, "eos_token_id": list(range(3, 13))},
    "several answers": {**SAMPLED, "num_return_sequences": 3},
    "stops too early": {**GREEDY, "eos_token_id": list(range(3, 13)), "min_new_tokens": 9},
}


@pytest.fixture
def count(monkeypatch):
    """Count what the runner takes."""
    taken, sample = [], sampling.sample

    def counted(*arguments):
        taken.append(1)
        return sample(*arguments)

    monkeypatch.setattr(generate, "sample", counted)
    return taken


def both(model, ids, **arguments):
    """Return what transformers generates, and what the runner does."""
    results = []
    arguments = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **arguments}
    for mode in ("never", "always"):
        torch.manual_seed(0)
        with use_runner(mode):
            results.append(model.generate(ids, **arguments))
    return results


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["llama", "qwen3-norms"])
def test_tokens_are_those_of_transformers(kind, call, batch, count):
    model = accelerate(build(kind))
    for length in (9, 12):
        expected, got = both(model, prompt(batch, length), **CALLS[call])
        assert torch.equal(got, expected)
    assert len(count) == 2


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["llama", "qwen3-norms"])
def test_prompts_of_different_lengths_are_padded_on_the_left(kind, call, count):
    model, ids = accelerate(build(kind)), prompt(4, 12)
    mask = (torch.arange(12) >= torch.tensor([[3], [0], [11], [7]])).long()
    expected, got = both(model, ids * mask, attention_mask=mask, **CALLS[call])
    assert torch.equal(got, expected)
    assert len(count) == 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    _, again = both(model, ids * mask, attention_mask=mask, position_ids=positions, **CALLS[call])
    assert torch.equal(again, got)
    assert len(count) == 2


def test_what_padding_holds_does_not_matter(count):
    model, ids = accelerate(build("llama")), prompt(2, 12)
    mask = (torch.arange(12) >= torch.tensor([[5], [0]])).long()
    filled = [ids * mask + token * (1 - mask) for token in (0, 7)]
    one, other = (both(model, each, attention_mask=mask, **GREEDY)[1] for each in filled)
    assert torch.equal(one[:, 12:], other[:, 12:])
    assert len(count) == 2


def test_stops_do_end_early():
    model = accelerate(build("llama"))
    _, got = both(model, prompt(1, 9), **CALLS["stops"])
    assert got.shape[1] < 29


class Streamer:
    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, tokens):
        self.heard += tokens.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("call", ["greedy", "sampled", "stops"])
def test_streamer_hears_everything(call, count):
    model, ids = accelerate(build("llama")), prompt(1, 9)
    streamers = []
    for mode in ("never", "always"):
        torch.manual_seed(0)
        streamers.append(Streamer())
        with use_runner(mode):
            out = model.generate(ids, streamer=streamers[-1], pad_token_id=0, **CALLS[call])
        assert streamers[-1].heard == out[0].tolist()
    assert streamers[0].heard == streamers[1].heard
    assert streamers[1].ended == 1
    assert len(count) == 1


def test_own_criteria_and_processors_are_asked(count):
    from transformers import (
        LogitsProcessorList,
        MaxLengthCriteria,
        MinNewTokensLengthLogitsProcessor,
        StoppingCriteriaList,
    )

    model, ids = accelerate(build("llama")), prompt(2, 9)

    def after_five(input_ids, _scores, **_kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 14)

    for criterion in (after_five, MaxLengthCriteria(14)):
        expected, got = both(
            model, ids, **GREEDY, stopping_criteria=StoppingCriteriaList([criterion])
        )
        assert torch.equal(got, expected) and got.shape[1] == 14
    processor = MinNewTokensLengthLogitsProcessor(9, 20, [40], device="cpu")
    expected, got = both(model, ids, **GREEDY, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(got, expected)
    assert len(count) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])},
    ],
    ids=str,
)
def test_what_the_runner_doesnt_do_goes_to_transformers(changes, count):
    model = accelerate(build("llama"))
    expected, got = both(model, prompt(2, 5), **{**GREEDY, **changes})
    sequences = getattr(got, "sequences", got)
    assert torch.equal(sequences, getattr(expected, "sequences", expected))
    assert not count


def test_a_cache_of_the_caller_is_filled(count):
    from transformers import DynamicCache

    model, ids, cache = accelerate(build("llama")), prompt(1, 5), DynamicCache()
    with use_runner("always"):
        model.generate(ids, past_key_values=cache, pad_token_id=0, **GREEDY)
    assert cache.get_seq_length() == 24
    assert not count


UNKNOWN: list[tuple[str, dict[str, Any]]] = [("gemma", {}), ("mistral", {"sliding_window": 16})]


def test_unknown_models_and_windows_go_to_transformers(count):
    for family, changes in UNKNOWN:
        model = accelerate(families.build(family, **changes).float())
        expected, got = both(model, prompt(1, 5), **GREEDY)
        assert torch.equal(got, expected)
    assert not count


def test_a_runner_in_use_is_left_alone():
    model, ids = accelerate(build("llama")), prompt(1, 5)
    inner: list[torch.Tensor] = []

    def generate_inside(_input_ids, scores):
        if not inner:
            inner.append(both(model, ids, **GREEDY)[1])
        return scores

    expected, got = both(model, ids, **GREEDY, logits_processor=[generate_inside])
    assert torch.equal(got, expected)
    inner.clear()
    with use_runner("always"):
        again = model.generate(ids, pad_token_id=0, logits_processor=[generate_inside], **GREEDY)
    assert torch.equal(again, expected)
    assert torch.equal(inner[0], expected)


def test_two_threads_make_one_decoder(monkeypatch):
    model, ids = accelerate(build("llama")), prompt(1, 5)
    with use_runner("never"):
        expected = model.generate(ids, pad_token_id=0, **GREEDY)
    made, weights_of, start = [], llama.weights_of, threading.Barrier(2)

    def slowly(model):
        made.append(1)
        time.sleep(0.2)
        return weights_of(model)

    def run(_index):
        start.wait()
        with use_runner("always"):
            return model.generate(ids, pad_token_id=0, **GREEDY)

    monkeypatch.setattr(llama, "weights_of", slowly)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(run, range(2)))
    assert len(made) == 1


def test_runs_on_different_streams_follow_one_another(monkeypatch):
    events: list[str] = []

    class Stream:
        def wait_event(self, event):
            events.append(f"wait for {event}")

        def record_event(self):
            events.append("record")
            return f"event {len(events)}"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream())
    weights: Any = SimpleNamespace(final_norm=SimpleNamespace(device=torch.device("cuda", 0)))
    decoder = SharedRunner(weights, OPS)
    for _ in range(2):
        assert decoder.take()
        assert not decoder.take()
        decoder.leave()
    assert events == ["record", "wait for event 1", "record"]


def test_switches(monkeypatch, count):
    model, ids = accelerate(build("llama")), prompt(1, 5)
    model.generate(ids, pad_token_id=0, **GREEDY)  # on a CPU: transformers
    monkeypatch.setenv("QTOOL_RUNNER", "0")
    model.generate(ids, pad_token_id=0, **GREEDY)
    assert not count


def test_a_backend_says_on_which_devices_it_decodes(monkeypatch, checkpoint, count):
    from transformers import AutoModelForCausalLM

    with use_backend("dense"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = prompt(1, 5)
    expected = model.generate(ids, pad_token_id=0, **GREEDY)
    assert not count
    monkeypatch.setattr(type(load_backend("dense")), "decodes_on", "cpu")
    assert torch.equal(model.generate(ids, pad_token_id=0, **GREEDY), expected)
    assert len(count) == 1
    monkeypatch.setattr(type(load_backend("dense")), "decode_ops", lambda *_: None)
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert torch.equal(model.generate(ids, pad_token_id=0, **GREEDY), expected)
    assert len(count) == 1, "without operations, transformers runs the model"


def test_changed_weights_are_noticed(count):
    model, ids = accelerate(build("llama")), prompt(1, 5)
    both(model, ids, **GREEDY)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    expected, got = both(model, ids, **GREEDY)
    assert torch.equal(got, expected)
    model.double().float()
    expected, got = both(model, ids, **GREEDY)
    assert torch.equal(got, expected)
    assert len(count) == 3


def test_long_answers_outgrow_the_first_cache(monkeypatch, count):
    monkeypatch.setattr(sampling, "FIRST_ROOM", 4)
    monkeypatch.setattr(sampling, "ROOM_STEP", 8)
    model, ids = accelerate(build("llama")), prompt(2, 5)
    for call in ("greedy", "sampled"):
        expected, got = both(model, ids, **{**CALLS[call], "max_new_tokens": 50})
        assert torch.equal(got, expected)
    assert len(count) == 2


def test_class_looks_the_same_and_copies_and_pickles(count):
    plain, model = build("llama"), accelerate(build("llama"))
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    assert type(accelerate(model)) is type(model)
    both(model, prompt(1, 5), **GREEDY)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected, got = both(again, prompt(1, 5), **GREEDY)
        assert torch.equal(got, expected)
    assert count


def test_checkpoint_uses_the_runner_and_saves_as_before(checkpoint, tmp_path, count):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected, got = both(model, prompt(2, 9), **GREEDY)
    assert torch.equal(got, expected)
    assert len(count) == 1
    assert model.config.architectures == ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected, got = both(again, prompt(2, 9), **GREEDY)
    assert torch.equal(got, expected)
