"""Steps of the `cpu` backend, one native call each, against the `reference` backend."""

import os
import threading

import pytest
import torch
from torch import nn

import qtool.runtime.backends
from qtool import plugins
from qtool.checkpoint.manifest import LayerEntry
from qtool.integrations.transformers import generate, sampling
from qtool.integrations.transformers.generate import accelerate, use_runner
from qtool.runtime.backends._choose import load_backend, use_backend
from qtool.runtime.backends.cpu.decode_step import SPANS, NativeStep
from qtool.runtime.decode.prompts import PromptSpan
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.runtime_decode.models import KINDS, build, prompt

CPU = torch.device("cpu")
SCHEME = WeightScheme(num_bits=3, group_size=32)


def why_not() -> str | None:
    """Return why there are no native steps here."""
    if "cpu" not in plugins.names(qtool.runtime.backends):
        return "there is no backend of that name"
    tensor = random_tensor("binary_coding", SCHEME, Shape2D(32, 64), 0)
    return load_backend("cpu").why_not(tensor, CPU)


WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no native steps: {WHY_NOT}")


def planes(module: nn.Linear, seed: int, scheme: WeightScheme) -> QuantizedLinear:
    """Return a random quantized linear of the shape and the size of another one."""
    shape = Shape2D(*module.weight.shape)
    entry = LayerEntry(format="binary_coding", scheme=scheme, shape=shape, method="rtn")
    tensor, linear = (
        random_tensor("binary_coding", scheme, shape, seed),
        QuantizedLinear(entry, module.bias),
    )
    for name, part in tensor.parts.items():
        linear.get_buffer(name).copy_(part / 8 if part.is_floating_point() else part)
    if module.bias is not None:
        linear.bias = module.bias
    return linear


def quantized(kind: str, dtype: torch.dtype = torch.float32, scheme: WeightScheme = SCHEME):
    """Return the same random quantized model each time, of the backend that is in use."""
    model = build(kind, dtype)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for seed, (name, module) in enumerate(list(part.named_children())):
                if isinstance(module, nn.Linear):
                    setattr(part, name, planes(module, seed, scheme))
    return accelerate(model.eval())


def pair(kind: str, dtype: torch.dtype = torch.float32, **changes):
    """Return a model by the definition, and by the native step."""
    models = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            models.append(
                quantized(kind, dtype, WeightScheme(**{"num_bits": 3, "group_size": 32, **changes}))
            )
    return models


def runner_of(model, *, max_length=64, batch=1, slots=None, kv_cache="auto"):
    weights = weights_of(model)
    module = next(one for one in model.modules() if isinstance(one, QuantizedLinear))
    ops = module.choose_backend().decode_ops(weights)
    if slots is not None:
        return SlotRunner(weights, ops, max_length=max_length, slots=slots)
    return DecodeRunner(weights, ops, max_length=max_length, batch=batch, kv_cache=kv_cache)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_definition(kind):
    reference, native = map(runner_of, pair(kind))
    assert reference.captured.whole is None
    experts = any(layer.experts is not None for layer in native.weights.layers)
    assert isinstance(native.captured.whole, NativeStep) != experts, "it knows no experts"
    chosen = []
    for runner in (reference, native):
        first = runner.prefill(prompt(1, 9)).argmax(-1)
        chosen.append(torch.cat([first[:, None], runner.greedy(first, 40)], 1))
        assert runner.state.positions.tolist() == [49]
        assert runner.state.steps.tolist() == [40]
    assert torch.equal(*chosen)


def test_codes_in_the_cache_are_no_native_step():
    reference, native = (runner_of(model, kv_cache="int8") for model in pair("llama"))
    assert native.captured.whole is None
    chosen = []
    for runner in (reference, native):
        first = runner.prefill(prompt(1, 9)).argmax(-1)
        chosen.append(torch.cat([first[:, None], runner.greedy(first, 12)], 1))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("tables", ["float32", "int16"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["llama-one-kv", "qwen2-bias", "qwen3-norms"])
def test_logits_of_sequences_of_unlike_lengths(kind, threads, tables, monkeypatch):
    monkeypatch.setenv("QTOOL_CPU_TABLES", tables)
    reference, native = (runner_of(model, batch=4, max_length=300) for model in pair(kind))
    ids, lengths, later = prompt(4, 200), torch.tensor([200, 3, 64, 129]), prompt(4, 5, seed=1)
    logits, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for runner in (reference, native):
            each = [runner.prefill(ids, lengths).clone()]
            each += [runner.step(tokens).clone() for tokens in later.T]
            logits.append(torch.stack(each))
    finally:
        torch.set_num_threads(before)
    if tables == "float32":  # they round nothing: all that differs is the order of sums
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    else:  # eight products in a row, each 2.5e-5 off: the errors of all of them, added up
        assert (logits[1] - logits[0]).norm() <= 8 * 2.5e-5 * logits[0].norm()


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
def test_each_sequence_of_a_batch_is_as_alone(batch):
    model = pair("llama")[1]
    ids, later = prompt(batch, 6), prompt(batch, 3, seed=1)
    many, alone = runner_of(model, batch=batch), runner_of(model)
    many.prefill(ids)
    got = torch.stack([many.step(tokens).clone() for tokens in later.T], 1)
    for row in range(batch):
        alone.prefill(ids[row : row + 1])
        expected = [alone.step(token[None]).clone() for token in later[row]]
        torch.testing.assert_close(got[row : row + 1], torch.stack(expected, 1), rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_round_less_than_the_definition(dtype):
    reference, native = (runner_of(model) for model in pair("llama", dtype))
    exact = runner_of(pair("llama")[0])
    ids = prompt(1, 20)
    expected = _steps(exact, ids)
    errors = [float((_steps(one, ids) - expected).abs().max()) for one in (reference, native)]
    assert errors[1] < 1.5 * errors[0] + 1e-3


def _steps(runner, ids):
    logits = [runner.prefill(ids[:, :5]).clone().float()]
    return torch.stack([*logits, *(runner.step(token).clone().float() for token in ids[:, 5:].T)])


@pytest.mark.parametrize(
    "changes",
    [{"num_bits": bits} for bits in (1, 2, 4, 8)]
    + [{"group_size": None}, {"symmetric": True}, {"group_size": 48}]
    + [{"group_dim": "out_features", "group_size": size} for size in (16, 40, None)],
    ids=str,
)
def test_schemes(changes):
    reference, native = (runner_of(model) for model in pair("llama-qkv-odd", **changes))
    got = [_steps(runner, prompt(1, 9)) for runner in (reference, native)]
    torch.testing.assert_close(got[1], got[0], rtol=0, atol=3e-4 * float(got[0].abs().max()))


def test_slots_that_begin_and_move():
    reference, native = (runner_of(model, slots=5) for model in pair("llama"))
    ids, logits = prompt(3, 6), []
    for runner in (reference, native):
        runner.read([PromptSpan(0, 0, 6), PromptSpan(1, 0, 2)], torch.cat([ids[0], ids[1, :2]]))
        each = [runner.step(torch.tensor([5, 6]))[0].clone()]
        runner.read([PromptSpan(2, 0, 4), PromptSpan(3, 0, 2)], ids[2])
        each += [runner.step(torch.tensor([7, 8, 9]))[0].clone()]  # slot 3 is half read
        each += [runner.read([PromptSpan(3, 2, 4)], ids[2, 2:])]
        runner.move(2, 0, 5)
        each += [runner.step(torch.tensor([3, 4]))[0].clone()]
        logits.append(torch.cat(each))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-4)


def test_generate_takes_the_native_step_by_itself(monkeypatch):
    taken, sample = [], sampling.sample

    def counted(*arguments):
        taken.append(1)
        return sample(*arguments)

    monkeypatch.setattr(generate, "sample", counted)
    ids = prompt(3, 12)
    mask = (torch.arange(12) >= torch.tensor([[5], [0], [11]])).long()
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    model = pair("llama")[1]
    got = model.generate(ids * mask, attention_mask=mask, **options)
    assert len(taken) == 1
    with use_runner("never"):
        expected = model.generate(ids * mask, attention_mask=mask, **options)
    assert torch.equal(got, expected)
    assert len(taken) == 1


def test_a_grown_runner_and_another_number_of_threads_go_on():
    reference, native = pair("llama")
    expected = _steps(runner_of(reference), prompt(1, 12))
    small = runner_of(native, max_length=8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        got = list(_steps(small, prompt(1, 12)[:, :8]))
        torch.set_num_threads(3)
        larger = small.grown(16)
        got += [larger.step(token).clone() for token in prompt(1, 12)[:, 8:].T]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(torch.stack(got), expected, rtol=0, atol=2e-4)


def test_two_models_in_two_threads():
    models = [pair(kind)[1] for kind in ("llama", "qwen3-norms")]
    runners = [runner_of(model) for model in models]
    expected = [_steps(runner, prompt(1, 40)) for runner in runners]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index):
        for _ in range(5):
            got[index].append(_steps(runners[index], prompt(1, 40)))

    threads = [threading.Thread(target=work, args=(index,)) for index in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, all_of_one in got.items():
        assert len(all_of_one) == 5
        assert all(torch.equal(one, expected[index]) for one in all_of_one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on():
    runner = runner_of(pair("llama")[1])
    expected = _steps(runner, prompt(1, 10))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run in the child
        try:
            torch.set_num_threads(1)  # torch's own pool doesn't survive a fork
            runner.length = 5
            runner.state.positions.fill_(5)
            logits = [runner.step(token).clone() for token in prompt(1, 10)[:, 5:].T]
            same = all(torch.equal(*each) for each in zip(logits, expected[1:], strict=True))
            os.write(writing, b"same" if same else b"other")
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 10) == b"same"
    os.close(reading)
    os.waitpid(child, 0)


def test_spans_add_up_to_less_than_the_time_of_a_step():
    runner = runner_of(pair("llama")[1])
    step = runner.captured.whole
    runner.prefill(prompt(1, 5))
    with step.timed() as seconds:
        runner.greedy(torch.tensor([3]), 8)
    assert tuple(seconds) == SPANS
    assert all(value > 0 for value in seconds.values())
    first = dict(seconds)
    runner.greedy(torch.tensor([3]), 8)
    assert seconds == first, "nothing is told after the block"
