"""The kernels' own text, run on the CPU, against the operations by torch."""

from dataclasses import dataclass, replace

import pytest
import torch

from qtool.runtime.backends.cuda import attention_grid
from qtool.runtime.backends.cuda.attention_grid import AttentionTuning
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode.cache import quantized_rows
from qtool.runtime.decode.ops import DecodeState
from qtool.runtime.decode.prompts import PromptSpan, packed
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS, heads_of
from qtool.runtime.decode.weights import DecoderLayer, DecoderShape
from qtool.settings import KvCache
from tests.helpers import normal
from tests.kernels.host import Recorder
from tests.runtime_decode.models import build, prompt

DTYPES = [torch.float16, torch.bfloat16]


def card(multiprocessors=2):
    return Card(multiprocessors=multiprocessors, shared_bytes=99 * 1024)


HOPPER = Card(multiprocessors=2, shared_bytes=227 * 1024, warpgroups=True)
TUNINGS = [
    AttentionTuning(warps=8, tiles=1, stages=2, resident=1, bulk=True),
    AttentionTuning(warps=4, tiles=2, stages=3, resident=2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 100, 576, 4096, 8200])
def test_rms_norm(hidden, dtype):
    x, weight = (3 * normal(3, hidden)).to(dtype), (1 + normal(hidden, seed=1)).to(dtype)
    x[1] *= 50
    got = KernelOps(Recorder(), card()).rms_norm(x, weight, 1e-5)
    expected = OPS.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert float((got != expected).float().mean()) < 0.01  # rounded as torch does, but for ties


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float16
    batch: int = 1
    splits: int = 4
    bias: bool = False
    norms: bool = False
    max_length: int = 260
    kv_cache: KvCache = "auto"

    @property
    def shape(self) -> DecoderShape:
        return DecoderShape(
            num_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=64,
            norm_eps=1e-5,
            attention_scale=0.7 * self.head_dim**-0.5,
            dtype=self.dtype,
        )

    @property
    def rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def layer(self) -> DecoderLayer:
        def norm(seed):
            return (1 + 0.5 * normal(self.head_dim, seed=seed)).to(self.dtype)

        nothing = torch.empty(0)
        return DecoderLayer(
            input_norm=nothing,
            qkv=nothing,
            qkv_bias=normal(self.rows, seed=5).to(self.dtype) if self.bias else None,
            query_norm=norm(6) if self.norms else None,
            key_norm=norm(7) if self.norms else None,
            output=nothing,
            mlp_norm=nothing,
            gate_up=nothing,
            down=nothing,
        )

    def state(self, positions, scratch) -> DecodeState:
        size = (2, self.batch, self.kv_heads, self.max_length, self.head_dim)
        angles = normal(self.max_length, self.head_dim // 2, seed=3)
        keys, values = normal(*size, seed=1).to(self.dtype), normal(*size, seed=2).to(self.dtype)
        scales = {}
        if self.kv_cache == "int8":
            (keys, one), (values, other) = quantized_rows(keys), quantized_rows(values)
            scales = {"key_scales": one, "value_scales": other}
        return DecodeState(
            keys=keys,
            values=values,
            **scales,
            rotary=torch.cat([angles.cos(), angles.sin()], -1),
            tokens=torch.zeros(self.batch, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            history=torch.zeros(self.batch, self.max_length + 1, dtype=torch.int64),
            steps=torch.tensor([41], dtype=torch.int32),
            scratch=scratch,
        )


CASES = [
    Case(8, 2, 128),
    Case(4, 4, 64, batch=2, dtype=torch.bfloat16),
    Case(6, 2, 96, bias=True, splits=3),
    Case(8, 1, 16, norms=True, batch=2),
    Case(2, 2, 256, norms=True, bias=True, dtype=torch.bfloat16),
    Case(14, 2, 80, splits=1),
    Case(12, 1, 8, splits=2),
    Case(16, 1, 128, norms=True),
]


INT8_CASES = [
    replace(case, kv_cache="int8")
    for case in (*CASES, Case(4, 2, 72, bias=True), Case(4, 1, 120, splits=2))
]


def poisoned(state: DecodeState) -> DecodeState:
    """Return a copy whose cache is NaN from each sequence's position on, or has NaN for scales."""
    places = torch.arange(state.keys.shape[3], device=state.keys.device)
    late = (places >= state.positions[:, None])[None, :, None]
    return replace(state, **{n: _poisoned(one, late) for n, one in state.cached().items()})


def _poisoned(buffer, late):
    if buffer.ndim == 5:
        late = late[..., None]
    return buffer.masked_fill(late, torch.nan if buffer.is_floating_point() else 77)


@pytest.mark.parametrize("position", [0, 1, 31, 32, 63, 64, 65, 128, 191, 259])
@pytest.mark.parametrize("case", [*CASES, *INT8_CASES], ids=str)
def test_attention(case, position):
    shape, layer = case.shape, case.layer()
    qkv = normal(case.batch, case.rows, seed=9).to(case.dtype)
    heads = attention_grid.heads_per_block(shape.group, shape.head_dim)
    blocks = case.kv_heads * shape.group // heads * case.batch
    launch = Recorder()
    ops = KernelOps(launch, card(case.splits * blocks))
    scratch = ops.scratch(shape, case.batch, case.max_length, torch.device("cpu"))
    assert scratch.shape[2] == case.splits
    positions = [position, max(0, position - 40)][: case.batch]
    clean = case.state(positions, None)
    state = replace(poisoned(clean), scratch=scratch)
    got = ops.attend(qkv, layer, 1, shape, state)
    expected = OPS.attend(qkv, layer, 1, shape, clean)
    eps = torch.finfo(case.dtype).eps
    # A key that is rounded the other way may have another code, which is a step of its score.
    steps = 0.03 if case.kv_cache == "int8" else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=8 * eps + steps)
    each, untouched = torch.arange(case.batch), poisoned(case.state(positions, None))
    for name, buffer in state.cached().items():
        stored, right = (one.cached()[name][1, each, :, positions] for one in (state, clean))
        steps = 1.0 if buffer.dtype == torch.int8 else 0.0
        atol = 2 * float(right.abs().max()) * eps + steps
        torch.testing.assert_close(stored.float(), right.float(), rtol=0, atol=atol)
        buffer[1, each, :, positions] = untouched.cached()[name][1, each, :, positions]
        torch.testing.assert_close(buffer, untouched.cached()[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], INT8_CASES[0], INT8_CASES[1]], ids=str)
def test_attention_is_that_of_float64_over_what_the_cache_holds(case):
    shape, layer, state = case.shape, case.layer(), case.state([200, 77][: case.batch], None)
    qkv = normal(case.batch, case.rows, seed=9).to(case.dtype)
    ops = KernelOps(Recorder(), card(case.splits * case.kv_heads * case.batch))
    scratch = ops.scratch(shape, case.batch, case.max_length, torch.device("cpu"))
    got = ops.attend(qkv, layer, 1, shape, replace(state, scratch=scratch))
    where = state.positions.long()
    query, _, value = heads_of(qkv, layer, shape, state.rotary[where])
    keys, values = state.keys[1].double(), state.values[1].double()
    if state.key_scales is not None and state.value_scales is not None:
        keys = keys * state.key_scales[1, ..., None].double()
        values = values * state.value_scales[1, ..., None].double()
        codes, scales = quantized_rows(value)  # values aren't rotated: not a bit may differ
        each = torch.arange(case.batch)
        assert torch.equal(state.values[1, each, :, where], codes)
        assert torch.equal(state.value_scales[1, each, :, where], scales)
    scores = torch.einsum("bhgd,bhld->bhgl", query.double().unflatten(1, (-1, shape.group)), keys)
    hidden = torch.arange(case.max_length) > where[:, None, None, None]
    weights = (scores * shape.attention_scale).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("bhgl,bhld->bhgd", weights, values).flatten(1)
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=float(4 * eps))


@pytest.mark.parametrize("case", [replace(case, batch=3) for case in CASES], ids=str)
def test_heads_of_prompts(case):
    spans, shape, layer = (
        [PromptSpan(2, 0, 5), PromptSpan(0, 7, 1), PromptSpan(1, 3, 4)],
        case.shape,
        case.layer(),
    )
    qkv = normal(10, case.rows, seed=9).to(case.dtype)
    mine, theirs = case.state([0, 7, 3], None), case.state([0, 7, 3], None)
    prompts, launch = packed(spans, mine.keys), Recorder()
    ops = KernelOps(launch, card())
    got = ops.attend_prompts(qkv.clone(), layer, 1, shape, mine, prompts)
    expected = OPS.attend_prompts(qkv, layer, 1, shape, theirs, prompts)
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(got, expected, rtol=0, atol=16 * eps)
    before = case.state([0, 7, 3], None)
    for name in ("keys", "values"):
        new, old, clean = (getattr(each, name) for each in (mine, theirs, before))
        torch.testing.assert_close(new, old, rtol=0, atol=8 * eps * float(old.abs().max()))
        changed = (new != clean).any(-1).any(2)
        assert changed.nonzero().tolist() == [
            [1, span.slot, position]
            for span in sorted(spans, key=lambda one: one.slot)
            for position in range(span.begin, span.end)
        ]
    assert launch.names == ["prompt_heads"]


def test_where_nobody_is_nothing_is_stored():
    case = replace(CASES[0], batch=3)
    ops = KernelOps(Recorder(), card())
    scratch = ops.scratch(case.shape, 3, case.max_length, torch.device("cpu"))
    qkv = normal(3, case.rows, seed=9).to(case.dtype)
    mine, theirs = case.state([5, -1, 9], scratch), case.state([5, -1, 9], None)
    got = ops.attend(qkv, case.layer(), 1, case.shape, mine)
    expected = OPS.attend(qkv, case.layer(), 1, case.shape, theirs)
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=0, atol=0.01)
    clean = case.state([5, -1, 9], None)
    for state in (mine, theirs):
        last = case.max_length - 1  # no prompt has it
        assert torch.equal(state.keys[1, 1, :, :last], clean.keys[1, 1, :, :last])
        assert torch.equal(state.values[1, 1, :, :last], clean.values[1, 1, :, :last])
        assert not torch.equal(state.values[1, 0], clean.values[1, 0])
    ops.choose(normal(3, 96).half(), mine)
    assert mine.positions.tolist() == [6, 0, 10]


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[5], INT8_CASES[0], INT8_CASES[-2]], ids=str)
def test_attention_by_other_rings(case, tuning, monkeypatch):
    monkeypatch.setitem(attention_grid.TUNED, case.dtype.itemsize, tuning)
    monkeypatch.setitem(attention_grid.TUNED, 1, tuning)
    case = replace(case, max_length=1000)
    ops, layer = KernelOps(Recorder(), HOPPER), case.layer()
    scratch = ops.scratch(case.shape, 1, case.max_length, torch.device("cpu"))
    qkv, clean = normal(1, case.rows, seed=9).to(case.dtype), case.state([937], None)
    got = ops.attend(qkv, layer, 1, case.shape, replace(poisoned(clean), scratch=scratch))
    expected = OPS.attend(qkv, layer, 1, case.shape, clean)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.01)


def test_parts_of_an_earlier_step_or_layer_are_not_taken():
    case = Case(2, 1, 64, splits=4)
    ops = KernelOps(Recorder(), card(4))
    shape, layer = case.shape, case.layer()
    scratch = ops.scratch(shape, 1, case.max_length, torch.device("cpu"))
    qkv = normal(1, case.rows, seed=9).half()
    for step, index, position in ((41, 0, 259), (41, 1, 259), (42, 0, 259), (43, 0, 100)):
        clean = case.state([position], None)
        clean.steps.fill_(step)
        got = ops.attend(qkv, layer, index, shape, replace(poisoned(clean), scratch=scratch))
        expected = OPS.attend(qkv, layer, index, shape, clean)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.01)
    marks = {int(word) >> 32 for word in scratch.flatten()}
    assert marks <= {0, *(step * 2 + layer + 1 for step in (41, 42, 43) for layer in (0, 1))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [96, 101, 40000])
def test_choice_of_the_next_tokens(vocabulary, dtype):
    case = replace(CASES[1], batch=4, dtype=dtype)
    mine, theirs = case.state([0, 5, 9, 258], None), case.state([0, 5, 9, 258], None)
    logits = normal(4, vocabulary).to(dtype)
    logits[1] = -3 - logits[1].abs()  # all negative
    logits[2, 7::11] = 99.0  # the first of equals
    logits[3, 50] = torch.nan
    KernelOps(Recorder(), card()).choose(logits, mine)
    OPS.choose(logits, theirs)
    assert mine.tokens.tolist() == logits.argmax(-1).tolist()
    for name in ("tokens", "positions", "history", "steps"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


@pytest.mark.parametrize(
    ("group", "head_dim", "heads"),
    [(4, 128, 4), (8, 128, 8), (8, 256, 4), (12, 64, 6), (7, 128, 7)],
)
def test_blocks_take_as_many_heads_as_fit(group, head_dim, heads):
    assert attention_grid.heads_per_block(group, head_dim) == heads


def test_splits_fill_the_card_and_follow_the_context():
    assert attention_grid.splits_for(card(132), 8, 4096) == 16
    assert attention_grid.splits_for(card(132), 8, 256) == 4
    assert attention_grid.splits_for(card(132), 256, 4096) == 1
    assert attention_grid.splits_for(card(132), 96, 4096) == 4  # three waves, almost full


@pytest.mark.parametrize("kind", ["llama", "qwen2-bias", "qwen3-norms"])
@pytest.mark.parametrize("lengths", [[20], [20, 20], [3, 20, 1]], ids=str)
def test_whole_steps_by_kernels(kind, lengths):
    batch = len(lengths)
    model, ids = build(kind, torch.float16), prompt(batch, 24)
    weights = weights_of(model)
    launch = Recorder()
    runners = [
        DecodeRunner(weights, ops, max_length=40, batch=batch)
        for ops in (OPS, KernelOps(launch, card()))
    ]
    each_length = torch.tensor(lengths)
    logits = [[runner.prefill(ids[:, :20], each_length).clone()] for runner in runners]
    for index in range(20, 24):
        for each, runner in zip(logits, runners, strict=True):
            each.append(runner.step(ids[:, index]).clone())
    torch.testing.assert_close(*map(torch.stack, logits), rtol=0, atol=0.02)
    begin = len(launch.calls)
    chosen = [runner.greedy(ids[:, 3], 1) for runner in runners]
    assert torch.equal(*chosen)
    per_layer = ["rms_norm", "decode_attention", "rms_norm"]
    assert launch.names[begin:] == [*per_layer, *per_layer, "rms_norm", "greedy"]
