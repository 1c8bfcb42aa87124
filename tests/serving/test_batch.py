"""The batch: whoever else is there, a sequence gets what it would get alone."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.slots import SlotRunner, widths
from qtool.runtime.decode.torch_ops import OPS
from qtool.serving.batch import Batch
from qtool.serving.decoders import ForwardDecoder, RunnerDecoder
from qtool.serving.tokens import FailureEvent, SamplingOptions, TokenEvent, TokenRequest
from tests.families import VOCABULARY
from tests.runtime_decode.models import build

LENGTH = 48


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def decoders(model):
    runner = SlotRunner(weights_of(model), OPS, max_length=LENGTH, slots=5)
    return {
        "runner": RunnerDecoder(runner),
        "forward": ForwardDecoder(model, max_length=LENGTH, slots=3),
    }


def request(key, *, prompt=None, most=8, stop=(), **sampling):
    generator = random.Random(f"{key}")
    prompt = prompt or [generator.randrange(3, VOCABULARY) for _ in range(1 + key % 17)]
    options = SamplingOptions(**{"temperature": 0, **sampling})
    return TokenRequest(key, prompt, most, frozenset(stop), options)


def finished(batch, requests=(), *, each=0):
    """Add requests, `each` before every step or all at once; return all tokens by key."""
    waiting, ends = list(requests), {}
    tokens: dict[Any, list[int]] = {}
    while waiting or not batch.is_idle:
        for one in waiting[: each or None]:
            batch.add(one)
        del waiting[: each or None]
        for event in batch.advance():
            assert event.key not in ends, "nothing comes after the end"
            tokens.setdefault(event.key, []).append(event.token)
            if event.finish:
                ends[event.key] = event.finish
    return tokens, ends


def by_generate(model, one):
    output = model.generate(
        torch.tensor([one.prompt], device=model.device),
        max_new_tokens=one.max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(one.prompt) :].tolist()


@pytest.mark.parametrize("name", ["runner", "forward"])
@pytest.mark.parametrize("each", [0, 1, 2])
def test_greedy_tokens_are_those_of_generate(model, decoders, name, each):
    requests = [request(key, most=1 + key * 5 % 14) for key in range(13)]
    tokens, ends = finished(Batch(decoders[name]), requests, each=each)
    for one in requests:
        assert tokens[one.key] == by_generate(model, one)
    assert ends == {one.key: "length" for one in requests}


@pytest.mark.parametrize("budgets", [(1, 1), (7, 3), (40, 5)])
@pytest.mark.parametrize("each", [0, 1])
def test_long_prompts_are_read_in_parts_while_others_go_on(
    model, decoders, monkeypatch, budgets, each
):
    decoder = decoders["runner"]
    log: list[Any] = []
    plain_read, plain_step = decoder.read, decoder.step

    def prompt_tokens(running):
        log.append(running)
        return budgets[running > 0]

    def read(parts):
        log.append([len(part.tokens) for part in parts])
        return plain_read(parts)

    def step(tokens):
        log.append("step")
        return plain_step(tokens)

    monkeypatch.setattr(decoder, "prompt_tokens", prompt_tokens)
    monkeypatch.setattr(decoder, "read", read)
    monkeypatch.setattr(decoder, "step", step)
    lengths = [4, 30, 2, 17, 9, 25, 1, 12]
    requests = [
        request(key, prompt=[3 + (key * 7 + i) % 90 for i in range(length)], most=3 + key * 5 % 11)
        for key, length in enumerate(lengths)
    ]
    tokens, _ = finished(Batch(decoder), requests, each=each)
    for one in requests:
        assert tokens[one.key] == by_generate(model, one)
    reads = [one for one in log if isinstance(one, list)]
    assert sum(map(sum, reads)) == sum(lengths)
    assert max(map(sum, reads)) <= max(budgets)
    beside = [0]  # between two steps
    for running, now in pairwise(log):
        if now == "step":
            beside.append(0)
        elif isinstance(now, list) and running:
            beside[-1] += sum(now)
    assert 0 < max(beside) <= budgets[1], "more than that makes others wait"
    assert sum(count > 0 for count in beside) > 5


def test_cancelled_in_the_middle_of_its_prompt(model, decoders, monkeypatch):
    decoder = decoders["runner"]
    monkeypatch.setattr(decoder, "prompt_tokens", lambda _: 4)
    batch = Batch(decoder)
    tokens: dict[Any, list[int]] = {}
    first, long, last = (request(k, prompt=[5 + k] * n) for k, n in ((0, 2), (1, 30), (2, 6)))
    for one in (first, long, last):
        batch.add(one)
    for turn in range(40):
        if turn == 5:
            batch.cancel(frozenset([1]))
        for event in batch.advance():
            assert isinstance(event, TokenEvent)
            tokens.setdefault(event.key, []).append(event.token)
    assert batch.is_idle
    assert tokens == {one.key: by_generate(model, one) for one in (first, last)}


@pytest.mark.parametrize("name", ["runner", "forward"])
def test_a_stop_token_ends_a_sequence_and_is_the_last(model, decoders, name):
    plain = [request(key, most=20) for key in range(8)]
    expected = {one.key: by_generate(model, one) for one in plain}
    stops = {key: tokens[key] for key, tokens in expected.items()}
    requests = [request(key, most=20, stop=[stops[key]]) for key in expected]
    tokens, ends = finished(Batch(decoders[name]), requests, each=1)
    for key, stop in stops.items():
        first = expected[key].index(stop)
        assert tokens[key] == expected[key][: first + 1]
        assert ends[key] == "stop"


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 11), max_size=2)), min_size=1, max_size=25
)


@given(steps=STEPS, name=st.sampled_from(["runner", "forward"]))
@settings(max_examples=25)
def test_cancelling_some_changes_nothing_for_others(model, decoders, steps, name):
    batch, key, gone = Batch(decoders[name]), 0, set()
    tokens: dict[Any, list[int]] = {}
    for arrivals, cancelled in steps:
        for _ in range(arrivals):
            batch.add(request(key, most=1 + key * 3 % 9))
            key += 1
        gone |= set(cancelled)
        batch.cancel(frozenset(cancelled))
        for event in batch.advance():
            assert event.key not in cancelled
            assert isinstance(event, TokenEvent)
            tokens.setdefault(event.key, []).append(event.token)
    gone = {one for one in gone if one < key}
    rest, _ = finished(batch)
    for one, more in rest.items():
        tokens.setdefault(one, []).extend(more)
    assert batch.num_running == batch.num_waiting == 0
    for one in range(key):
        expected = by_generate(model, request(one, most=1 + one * 3 % 9))
        got = tokens.get(one, [])
        assert got == (expected[: len(got)] if one in gone else expected)


@pytest.mark.parametrize("name", ["runner", "forward"])
def test_seeds_give_the_same_alone_and_among_others(decoders, name):
    sampled = [request(key, most=12, temperature=0.9, top_p=0.8, seed=key) for key in range(4)]
    alone: dict[Any, list[int]] = {}
    for one in sampled:
        alone |= finished(Batch(decoders[name]), [one])[0]
    others = [request(key, temperature=1.5, most=5 + key % 5) for key in range(20, 28)]
    mixed = [*others[:3], *sampled[:2], *others[3:], *sampled[2:]]
    together, _ = finished(Batch(decoders[name]), mixed, each=2)
    assert {key: together[key] for key in alone} == alone
    assert len({tuple(tokens) for tokens in alone.values()}) > 1


def test_logprobs_are_those_of_the_model(model, decoders):
    one = request(3, most=6, top_logprobs=4)
    for decoder in decoders.values():
        batch = Batch(decoder)
        events: list[Any] = []
        batch.add(one)
        batch.add(request(4, most=9))
        while not batch.is_idle:
            events += [event for event in batch.advance() if event.key == 3]
        ids = torch.tensor([[*one.prompt, *(event.token for event in events)]])
        with torch.no_grad():
            expected = model(ids).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
        for event, row in zip(events, expected, strict=True):
            values, indices = row.topk(4)
            assert [token for token, _ in event.logprobs.top] == indices.tolist()
            got = torch.tensor([value for _, value in event.logprobs.top])
            torch.testing.assert_close(got, values, rtol=0, atol=1e-4)
            assert event.logprobs.logprob == pytest.approx(float(row[event.token]), abs=1e-4)


def test_a_prompt_without_memory_fails_alone(decoders, monkeypatch):
    decoder, plain = decoders["forward"], decoders["forward"].read

    def read(parts):
        if len(parts[0].tokens) == 13:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(parts)

    monkeypatch.setattr(decoder, "read", read)
    batch, events = Batch(decoder), []
    for key in (5, 12, 6):
        batch.add(request(key))
    while not batch.is_idle:
        events += batch.advance()
    (failure,) = [event for event in events if isinstance(event, FailureEvent)]
    assert failure.key == 12
    assert "13 tokens" in failure.message
    ended = {event.key for event in events if isinstance(event, TokenEvent) and event.finish}
    assert ended == {5, 6}


def test_caches_of_ended_sequences_are_let_go(decoders):
    finished(Batch(decoders["forward"]), [request(key) for key in range(7)])
    assert decoders["forward"]._caches == [None] * 3


def test_a_cache_can_be_filled_to_its_end(decoders, model):
    for decoder in decoders.values():
        requests = [request(key, prompt=[5 + key] * 40, most=LENGTH - 40) for key in range(6)]
        tokens, _ = finished(Batch(decoder), requests, each=1)
        assert all(tokens[one.key] == by_generate(model, one) for one in requests)


def test_widths_are_powers_of_two_and_all_slots():
    assert [widths(slots) for slots in (1, 2, 5, 16)] == [
        [1],
        [1, 2],
        [1, 2, 4, 5],
        [1, 2, 4, 8, 16],
    ]
