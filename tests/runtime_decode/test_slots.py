"""Slots of one cache: sequences that begin, end and move at different times."""

import pytest
import torch

from qtool.errors import BackendError
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.decode.torch_ops import OPS
from tests.runtime_decode.models import KINDS, build, prompt


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
            length = torch.tensor([lengths[row]], device=ids.device)
            got[row].append(slots.prefill(len(running), ids[row : row + 1], length)[0].clone())
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


@pytest.mark.parametrize(
    ("kind", "kv_cache"), [*((kind, "auto") for kind in KINDS), ("llama", "int8")]
)
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
        right, atol = alone(one, ids[row], length), 1e-5 if kv_cache == "auto" else 2e-3
        torch.testing.assert_close(got[row], right, rtol=1e-4, atol=atol)


@torch.no_grad()
def test_prompts_that_are_read_together():
    weights, ids, lengths = weights_of(build("llama")), prompt(3, 9), torch.tensor([9, 2, 5])
    slots, one = (
        SlotRunner(weights, OPS, max_length=16, slots=4),
        DecodeRunner(weights, OPS, max_length=16),
    )
    logits = slots.prefill(1, ids, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row], one.prefill(ids[row : row + 1, :length])[0])


@torch.no_grad()
def test_slots_without_a_sequence_never_run_out_of_room():
    weights = weights_of(build("llama"))
    slots = SlotRunner(weights, OPS, max_length=8, slots=4)
    for _ in range(6):
        slots.prefill(0, prompt(3, 2), torch.tensor([2, 2, 2]))
        for _ in range(6):
            slots.step(torch.tensor([3, 4, 5]))
    assert slots.state.positions[:3].tolist() == [8, 8, 8]
    assert int(slots.state.positions[3]) <= 1


def test_a_window_that_would_count_is_refused():
    from dataclasses import replace

    weights = replace(weights_of(build("llama")), longest=32)
    with pytest.raises(BackendError, match="window of 32"):
        SlotRunner(weights, OPS, max_length=33, slots=2)
