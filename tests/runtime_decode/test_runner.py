"""The runner by torch, on the CPU, against transformers."""

import pytest
import torch

from qtool.errors import BackendError
from qtool.runtime.decode import runner as decode_runner
from qtool.runtime.decode.read_model import weights_of, why_not
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS
from tests import families
from tests.runtime_decode.models import KINDS, build, prompt

TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}


def runner_of(model, *, max_length=64, batch=1):
    return DecodeRunner(weights_of(model), OPS, max_length=max_length, batch=batch)


def stepwise(runner, ids, length):
    """Return the logits after a prompt of `length` tokens and after each later one."""
    logits = [runner.prefill(ids[:, :length]).clone()]
    logits += [runner.step(ids[:, index]).clone() for index in range(length, ids.shape[1])]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_transformers(kind, dtype):
    model, ids = build(kind, dtype), prompt(2, 30)
    got = stepwise(runner_of(model, batch=2), ids, 10)
    expected = model(ids).logits[:, 9:]
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype])


def test_greedy_tokens_are_the_likeliest_and_the_runner_begins_anew():
    model, ids = build("llama"), prompt(2, 7)
    runner = runner_of(model, batch=2)
    for _ in range(2):
        first = runner.prefill(ids).argmax(-1)
        chosen = runner.greedy(first, 12)
        logits = stepwise(runner, torch.cat([ids, first[:, None], chosen], 1), 7)
        assert torch.equal(chosen, logits[:, 1:-1].argmax(-1))


LENGTHS = [7, 2, 12, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_a_batch_are_as_those_alone(kind):
    model, ids, lengths = build(kind), prompt(4, 12), torch.tensor(LENGTHS)
    runner, alone = runner_of(model, batch=4), runner_of(model)
    later = prompt(4, 3, seed=1)
    logits = [runner.prefill(ids, lengths).clone(), *(runner.step(t).clone() for t in later.T)]
    for row, length in enumerate(LENGTHS):
        each = torch.cat([ids[row, :length], later[row]])[None]
        expected = stepwise(alone, each, length)
        torch.testing.assert_close(torch.stack(logits, 1)[row : row + 1], expected)


def test_greedy_and_growth_with_sequences_of_different_lengths():
    model, ids, lengths = build("llama"), prompt(4, 12), torch.tensor(LENGTHS)
    runner, alone = runner_of(model, batch=4, max_length=20), runner_of(model)
    first = runner.prefill(ids, lengths).argmax(-1)
    early = runner.greedy(first, 8)
    with pytest.raises(BackendError, match="larger max_length"):
        runner.greedy(early[:, -1], 1)
    late = runner.grown(40).greedy(early[:, -1], 8)
    for row, length in enumerate(LENGTHS):
        start = alone.prefill(ids[row : row + 1, :length]).argmax(-1)
        assert start == first[row]
        expected = alone.greedy(start, 16)[0]
        assert torch.equal(torch.cat([early[row], late[row]]), expected)


def test_greedy_looks_for_stops_now_and_then(monkeypatch):
    monkeypatch.setattr(decode_runner, "CHECK_EVERY", 3)
    model, ids = build("llama"), prompt(2, 7)
    runner = runner_of(model, batch=2)
    first = runner.prefill(ids).argmax(-1)
    chosen = runner.greedy(first, 40)
    stops = chosen[:, 4].tolist()
    where = max(int(torch.isin(row, torch.tensor(stops)).nonzero()[0]) for row in chosen)
    runner.prefill(ids)
    shorter = runner.greedy(first, 40, stop_ids=stops)
    assert where < shorter.shape[1] <= where + 3
    assert torch.equal(shorter, chosen[:, : shorter.shape[1]])


def test_a_grown_runner_goes_on():
    model, ids = build("llama"), prompt(1, 30)
    small = runner_of(model, max_length=20)
    before = stepwise(small, ids[:, :20], 10)
    larger = small.grown(30)
    after = torch.stack([larger.step(ids[:, index]).clone() for index in range(20, 30)], 1)
    expected = stepwise(runner_of(model), ids, 10)
    torch.testing.assert_close(torch.cat([before, after], 1), expected)


def test_full_cache_and_other_batches_say_what_to_do():
    runner = runner_of(build("llama"), max_length=8)
    with pytest.raises(BackendError, match=r"9 tokens don't fit into a cache of 8.*max_length"):
        runner.prefill(prompt(1, 9))
    with pytest.raises(BackendError, match="1 sequences, not 2"):
        runner.prefill(prompt(2, 4))
    runner.prefill(prompt(1, 8))
    with pytest.raises(BackendError, match="max_length"):
        runner.step(torch.tensor([3]))
    with pytest.raises(BackendError, match="max_length"):
        runner.greedy(torch.tensor([3]), 1)


def test_a_sliding_window_bounds_the_length():
    model = families.build("mistral", sliding_window=12).float()
    weights, ids = weights_of(model), prompt(1, 12)
    assert weights.longest == 12
    with pytest.raises(BackendError, match="window of 12"):
        DecodeRunner(weights, OPS, max_length=13)
    got = stepwise(DecodeRunner(weights, OPS, max_length=12), ids, 3)
    torch.testing.assert_close(got, model(ids).logits[:, 2:], rtol=0, atol=1e-5)


def test_runner_made_in_inference_mode_runs_outside_and_the_other_way_round():
    model, ids = build("llama"), prompt(1, 8)
    with torch.inference_mode():
        runner = runner_of(model)
    outside = stepwise(runner, ids, 4)
    with torch.inference_mode():
        inside = stepwise(runner, ids, 4)
    assert torch.equal(inside, outside)


def changed(**changes):
    return families.build("llama", **changes)


def hooked():
    model = build("llama")
    model.model.layers[1].register_forward_hook(lambda *_args: None)
    return model


def replaced():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: families.build("gemma"), "a gemma"),
        (lambda: build("llama").model, "no head"),
        (lambda: families.build("qwen2_moe"), "qwen2_moe"),
        (lambda: changed(attention_bias=True), "has a bias"),
        (lambda: changed(mlp_bias=True), "has a bias"),
        (lambda: changed(hidden_act="gelu"), "gelu"),
        (lambda: build("llama").train(), "training"),
        (hooked, "hook"),
        (replaced, "replaced"),
    ],
)
def test_what_isnt_known_is_refused_with_a_sentence(make, reason):
    model = make()
    sentence = why_not(model)
    assert sentence is not None and reason in sentence and sentence.endswith(".")
    with pytest.raises(BackendError, match="can't run this model"):
        weights_of(model)
