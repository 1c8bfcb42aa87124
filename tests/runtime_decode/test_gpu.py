"""On a card: kernels, CUDA graphs, and `generate` of a model there."""

import gc
from dataclasses import replace

import pytest
import torch

from qtool.integrations.transformers import generate
from qtool.integrations.transformers.generate import accelerate, use_runner
from qtool.integrations.transformers.sampling import SharedRunner
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.cuda import driver
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.decode import step
from qtool.runtime.decode.ops import DecodeState
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.decode.torch_ops import OPS
from qtool.serving.batch import Batch
from qtool.serving.decoders import RunnerDecoder
from qtool.serving.tokens import SamplingOptions, TokenRequest
from tests.runtime_decode.models import KINDS, build, prompt
from tests.runtime_decode.test_generate import CALLS, GREEDY, Streamer
from tests.runtime_decode.test_kernels import CASES, INT8_CASES, Case, poisoned
from tests.runtime_decode.test_slots import alone, in_slots
from tests.serving.test_batch import finished

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 0.03, torch.bfloat16: 0.2}


def kernels() -> KernelOps:
    """Return the operations on the first card."""
    pytest.importorskip("cupy")
    return KernelOps(driver.launch, driver.card_of(0))


def on_card(state: DecodeState) -> DecodeState:
    names = ("rotary", "tokens", "positions", "history", "steps")
    tensors = state.cached() | {name: getattr(state, name) for name in names}
    return replace(state, **{name: tensor.cuda() for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_logits_are_those_of_transformers(kind, batch, dtype):
    model, ids = build(kind, dtype).cuda(), prompt(batch, 40).cuda()
    weights = weights_of(model)
    runner = DecodeRunner(weights, kernels(), max_length=64, batch=batch)
    for length in (20, 7):  # the second replays what the first captured
        logits = [runner.prefill(ids[:, :length]).clone()]
        logits += [runner.step(ids[:, index]).clone() for index in range(length, 40)]
        expected = model(ids).logits[:, length - 1 :]
        got = torch.stack(logits, 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("with_kernels", [True, False])
@torch.no_grad()
def test_a_replayed_graph_is_the_step(with_kernels):
    model, ids = build("llama", torch.float16).cuda(), prompt(2, 200).cuda()
    weights = weights_of(model)
    ops = kernels() if with_kernels else OPS
    graph, eager = (DecodeRunner(weights, ops, max_length=200, batch=2) for _ in range(2))
    for runner in (graph, eager):
        runner.prefill(ids[:, :30])
    for index in range(30, 200):
        eager.state.tokens.copy_(ids[:, index])
        expected = step.decode(weights, eager.state, ops)
        ops.choose(expected, eager.state)
        got = graph.step(ids[:, index])
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
        assert torch.equal(graph.state.tokens, got.argmax(-1))
    assert graph.state.positions.tolist() == eager.state.positions.tolist() == [200, 200]
    torch.testing.assert_close(graph.state.keys, eager.state.keys, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@pytest.mark.parametrize("with_kernels", [True, False])
@torch.no_grad()
def test_sequences_in_slots_are_as_those_alone(with_kernels, kv_cache):
    weights, ids = weights_of(build("llama", torch.float16).cuda()), prompt(6, 90).cuda()
    lengths, ops = [80, 3, 70, 1, 85, 40], kernels() if with_kernels else OPS
    one = DecodeRunner(weights, ops, max_length=96, kv_cache=kv_cache)
    slots = SlotRunner(weights, ops, max_length=96, slots=3, kv_cache=kv_cache)
    slots.prepare()
    for _ in range(2):
        got = in_slots(slots, ids, lengths)
        for row, length in enumerate(lengths):
            expected = alone(one, ids[row], length)
            torch.testing.assert_close(got[row], expected, rtol=0, atol=TOLERANCE[torch.float16])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_on_a_card_gives_what_each_would_get_alone(temperature):
    """Tokens may part where two are as likely as each other, within rounding; most don't."""
    model = build("llama", torch.float16).cuda()
    decoder = RunnerDecoder(SlotRunner(weights_of(model), kernels(), max_length=96, slots=5))
    decoder.prepare()
    sampling = [SamplingOptions(temperature=temperature, top_p=0.9, seed=n) for n in range(12)]
    requests = [
        TokenRequest(n, prompt(1, 2 + 5 * n, seed=n)[0].tolist(), 20, frozenset(), one)
        for n, one in enumerate(sampling)
    ]
    alone_tokens: dict[object, list[int]] = {}
    for one in requests:
        alone_tokens |= finished(Batch(decoder), [one])[0]
    together, ends = finished(Batch(decoder), requests, each=2)
    assert ends == dict.fromkeys(range(12), "length")
    assert sum(together[n] == alone_tokens[n] for n in range(12)) >= 8


def test_greedy_tokens_are_the_likeliest():
    model, ids = build("llama", torch.float16).cuda(), prompt(2, 20).cuda()
    runner = DecodeRunner(weights_of(model), kernels(), max_length=100, batch=2)
    for _ in range(2):
        first = runner.prefill(ids).argmax(-1)
        chosen = runner.greedy(first, 60)
        runner.prefill(ids)
        tokens = first
        for index in range(60):
            tokens = runner.step(tokens).argmax(-1)
            assert torch.equal(tokens, chosen[:, index])


@pytest.mark.parametrize("position", [0, 63, 64, 100, 1000, 4095])
@pytest.mark.parametrize("case", [*CASES, *INT8_CASES], ids=str)
def test_attention_over_all_splits(case: Case, position):
    case = replace(case, max_length=4096)
    shape, layer, clean = (
        case.shape,
        case.layer(),
        on_card(case.state([position] * case.batch, None)),
    )
    moved = {
        name: getattr(layer, name).cuda()
        for name in ("qkv_bias", "query_norm", "key_norm")
        if getattr(layer, name) is not None
    }
    layer = replace(layer, **moved)
    qkv = torch.randn(case.batch, case.rows, device="cuda").to(case.dtype)
    ops = kernels()
    scratch = ops.scratch(shape, case.batch, case.max_length, torch.device("cuda"))
    results = []
    for count in range(50):  # a race would show as a difference
        state = replace(poisoned(clean), scratch=scratch)
        state.steps.fill_(41 + count)
        results.append(ops.attend(qkv, layer, 1, shape, state))
    expected = OPS.attend(qkv, layer, 1, shape, clean)
    eps = torch.finfo(case.dtype).eps
    steps = 0.03 if case.kv_cache == "int8" else 0.0  # of a code, as on the CPU
    torch.testing.assert_close(results[0], expected, rtol=0, atol=8 * eps + steps)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("hidden", [64, 100, 4096, 8192, 20000])
def test_rms_norm(hidden):
    x, weight = torch.randn(5, hidden).half().cuda(), torch.randn(hidden).half().cuda()
    got = kernels().rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, OPS.rms_norm(x, weight, 1e-5), rtol=2e-3, atol=1e-6)


def load(checkpoint):
    """Return a model on the card that the kernels run."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("cupy")
    with use_backend("cuda"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16)
    return model.cuda().eval()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def kept_bytes() -> int:
    """Return what launches keep on all cards, to be zeros for later ones."""
    tensors = [*driver._ZEROS.values(), *driver._SPARE.values(), *driver._KEPT]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def test_packed_weights_generate_and_are_held_once(checkpoint):
    model, ids = load(checkpoint), prompt(1, 30).cuda()
    before = model(ids).logits
    apart = allocated()
    weights = weights_of(model)
    assert isinstance(weights.layers[0].qkv, KernelWeight)
    assert allocated() <= apart, "fused weights take the place of the modules' own"
    runner = DecodeRunner(weights, kernels(), max_length=64)
    logits = [runner.prefill(ids[:, :20]).clone()]
    logits += [runner.step(ids[:, index]).clone() for index in range(20, 30)]
    torch.testing.assert_close(torch.stack(logits, 1), before[:, 19:], rtol=0, atol=0.03)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0.01)


@torch.no_grad()
def test_checkpoint_generates_through_kernels(checkpoint):
    model, ids, decoders = load(checkpoint), prompt(2, 9).cuda(), []
    for call, among in (("greedy", 1), ("sampled", 20), ("greedy", 1)):
        out = model.generate(ids, pad_token_id=0, **CALLS[call])
        decoders.append(generate._MADE[model].decoder)
        logits = model(out).logits[:, 8:-1].float()  # of modules called one by one
        chosen = logits.gather(-1, out[:, 9:, None])
        assert chosen.shape == (2, 20, 1)
        assert bool((chosen >= logits.topk(among).values[..., -1:] - 0.06).all())
    decoder = decoders[0]
    assert all(each is decoder for each in decoders)
    assert isinstance(decoder, SharedRunner)
    assert isinstance(decoder.ops, KernelOps)
    assert decoder.runner is not None and decoder.runner.captured.recorded is not None


def test_a_model_that_leaves_the_card_leaves_nothing_there(checkpoint):
    def used_and_left():
        begin, model = allocated() - kept_bytes(), load(checkpoint)
        model.generate(prompt(1, 9).cuda(), pad_token_id=0, **GREEDY)
        used = allocated() - kept_bytes() - begin
        model.cpu()
        return used, allocated() - kept_bytes() - begin

    used_and_left()  # what kernels and libraries keep is there from now on
    used, left = used_and_left()
    assert left < used / 4


def test_streams_share_a_decoder_in_turn():
    model, ids = accelerate(build("llama").cuda()), [prompt(1, 9, seed).cuda() for seed in (0, 1)]
    expected = [model.generate(each, pad_token_id=0, **GREEDY) for each in ids]
    streams = [torch.cuda.Stream() for _ in ids]
    for _ in range(20):
        got = []
        for stream, each in zip(streams, ids, strict=True):
            with torch.cuda.stream(stream):
                got.append(model.generate(each, pad_token_id=0, **GREEDY))
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("padding", [[0, 0], [0, 5], [8, 0]])
@pytest.mark.parametrize("call", CALLS)
def test_generate_is_that_of_transformers(call, padding):
    model, ids = accelerate(build("llama").cuda()), prompt(2, 9).cuda()
    mask = (torch.arange(9) >= torch.tensor(padding)[:, None]).long().cuda()
    results = []
    for mode in ("never", "auto"):
        torch.manual_seed(0)
        with use_runner(mode):
            results.append(
                model.generate(ids * mask, attention_mask=mask, pad_token_id=0, **CALLS[call])
            )
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["llama", "qwen3-norms"])
@torch.no_grad()
def test_sequences_of_a_batch_are_as_those_alone(kind):
    lengths, ids = [300, 7, 64, 1], prompt(4, 340).cuda()
    weights = weights_of(build(kind, torch.float16).cuda())
    runner, alone = (
        DecodeRunner(weights, kernels(), max_length=400, batch=batch) for batch in (4, 1)
    )
    later = ids[:, 300:]
    logits = [runner.prefill(ids[:, :300], torch.tensor(lengths).cuda()).clone()]
    logits += [runner.step(tokens).clone() for tokens in later.T]
    for row, length in enumerate(lengths):
        expected = [alone.prefill(ids[row : row + 1, :length]).clone()]
        expected += [alone.step(token[None]).clone() for token in later[row]]
        got = torch.stack([each[row] for each in logits])
        torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=TOLERANCE[torch.float16])


def test_streamer_hears_everything():
    model, ids, streamer = accelerate(build("llama").cuda()), prompt(1, 9).cuda(), Streamer()
    out = model.generate(ids, streamer=streamer, pad_token_id=0, **GREEDY)
    assert streamer.heard == out[0].tolist()
