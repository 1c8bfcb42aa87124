"""Slots of one cache: sequences that begin, end and move at different times."""

from functools import partial

import pytest
import torch

from qtool.errors import BackendError
from qtool.runtime.decode.prompts import PromptSpan
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.decode.torch_ops import OPS
from tests.runtime_decode.models import KINDS, build, prompt

CACHES = [*((kind, "auto") for kind in KINDS), ("llama", "int8")]
ATOL = {"auto": 1e-5, "int8": 2e-3}
"""A rounding may turn a code."""


def alone(runner, ids, length):
    """Return the logits after a prompt of `length` tokens and after each later one."""
    logits = [runner.prefill(ids[None, :length]).clone()]
    logits += [runner.step(token[None]).clone() for token in ids[length:]]
    return torch.cat(logits)


def in_slots(slots, ids, lengths):
    """Return the same of sequences that join one by one; the first ends early, the last moves."""
    got: dict[int, list[torch.Tensor]] = {row: [] for row in range(len(ids))}
    running: list[int] = []
    used: dict[int, int] = {}
    while running or not all(got.values()):
        row = next((r for r in got if not got[r]), None)
        if row is not None and len(running) < slots.slots:
            span = PromptSpan(len(running), 0, lengths[row])
            got[row].append(slots.read([span], ids[row, : lengths[row]])[0].clone())
            running.append(row)
            used[row] = lengths[row]
        tokens = torch.stack([ids[r, used[r]] for r in running])
        logits, likeliest = slots.step(tokens)
        assert torch.equal(likeliest, logits.argmax(-1))
        for slot, r in enumerate(running):
            got[r].append(logits[slot].clone())
            used[r] += 1
        for slot in reversed(range(len(running))):
            if used[running[slot]] == ids.shape[1]:
                last = running.pop()
                if slot != len(running):
                    slots.move(len(running), slot, used[last])
                    running[slot] = last
    return {row: torch.stack(parts) for row, parts in got.items()}


@pytest.mark.parametrize(("kind", "kv_cache"), CACHES)
@torch.no_grad()
def test_sequences_in_slots_are_as_those_alone(kind, kv_cache):
    model, ids, lengths = build(kind), prompt(6, 14), [12, 3, 9, 1, 13, 6]
    weights = weights_of(model)
    one, slots = (
        DecodeRunner(weights, OPS, max_length=16, kv_cache=kv_cache),
        SlotRunner(weights, OPS, max_length=16, slots=3, kv_cache=kv_cache),
    )
    got = in_slots(slots, ids, lengths)
    for row, length in enumerate(lengths):
        right, atol = alone(one, ids[row], length), ATOL[kv_cache]
        torch.testing.assert_close(got[row], right, rtol=1e-4, atol=atol)


@torch.no_grad()
def test_prompts_that_are_read_together():
    weights, ids, lengths = weights_of(build("llama")), prompt(3, 9), torch.tensor([9, 2, 5])
    slots, one = (
        SlotRunner(weights, OPS, max_length=16, slots=4),
        DecodeRunner(weights, OPS, max_length=16),
    )
    spans = [PromptSpan(slot, 0, int(length)) for slot, length in enumerate(lengths, 1)]
    logits = slots.read(spans, torch.cat([ids[0], ids[1, :2], ids[2, :5]]))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row], one.prefill(ids[row : row + 1, :length])[0])


@pytest.mark.parametrize(("kind", "kv_cache"), CACHES)
@pytest.mark.parametrize("cuts", [[1, 2, 11], [5, 6], [13]])
@torch.no_grad()
def test_a_prompt_read_in_parts_between_steps_of_others_is_read_whole(kind, kv_cache, cuts):
    weights, ids = weights_of(build(kind)), prompt(2, 14)
    slots = SlotRunner(weights, OPS, max_length=16, slots=5, kv_cache=kv_cache)
    one = DecodeRunner(weights, OPS, max_length=16, kv_cache=kv_cache)
    near = partial(torch.testing.assert_close, rtol=1e-4, atol=ATOL[kv_cache])
    slots.read([PromptSpan(0, 0, 2)], ids[0, :2])
    stepped: list[torch.Tensor] = []
    read, begin = [], 0
    for end in [*cuts, 14]:
        spans = [
            PromptSpan(2, begin, end - begin),
            PromptSpan(1, 0, 1),
        ]  # a slot of its own, and another
        tokens = torch.cat([ids[1, begin:end], ids[0, :1]])
        read.append((end, slots.read(spans, tokens)[0]))
        stepped.append(slots.step(ids[0, 2 + len(stepped)][None])[0][0].clone())
        stepped.append(slots.step(ids[0, 2 + len(stepped)][None])[0][0].clone())
        slots.step(ids[0, [2 + len(stepped), 0]])  # of two slots, so that a third idles
        slots.read([PromptSpan(0, 0, 2 + len(stepped))], ids[0, : 2 + len(stepped)])
        begin = end
    for end, logits in read:
        near(logits, one.prefill(ids[1:, :end])[0])
    expected = alone(one, ids[0, : 2 + len(stepped)], 2)[1:]
    near(torch.stack(stepped), expected)
    slots.move(2, 1, 14)
    got = slots.step(torch.stack([ids[0, 0], ids[1, 0]]))[0][1]
    one.prefill(ids[1:])
    near(got, one.step(ids[1, :1])[0])


@torch.no_grad()
def test_slots_without_a_sequence_never_run_out_of_room():
    weights = weights_of(build("llama"))
    slots = SlotRunner(weights, OPS, max_length=8, slots=4)
    for _ in range(6):
        slots.read([PromptSpan(slot, 0, 2) for slot in range(3)], prompt(3, 2).flatten())
        for _ in range(6):
            slots.step(torch.tensor([3, 4, 5]))
    assert slots.state.positions[:3].tolist() == [8, 8, 8]
    assert int(slots.state.positions[3]) <= 1


def test_a_window_that_would_count_is_refused():
    from dataclasses import replace

    weights = replace(weights_of(build("llama")), longest=32)
    with pytest.raises(BackendError, match="window of 32"):
        SlotRunner(weights, OPS, max_length=33, slots=2)
