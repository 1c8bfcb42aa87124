"""Quantized weights: fused for the decoder, shared with the modules, run by kernels."""

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch

from qtool.base import QuantizedTensor
from qtool.core import layout
from qtool.integrations.transformers import generate
from qtool.integrations.transformers.generate import accelerate, use_runner
from qtool.modeling.locate import Location
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda import fusing, linear_kernels
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode import torch_ops
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.torch_ops import OPS
from qtool.runtime.decode.weights import DecoderWeights
from qtool.runtime.modules import QuantizedWeight
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder
from tests.runtime_decode.models import prompt

CARD = Card(multiprocessors=2, shared_bytes=144 * 1024)
SCHEME = WeightScheme(num_bits=3, group_size=32)


def tensor(rows: int, inputs: int = 96, seed: int = 0, **changes) -> QuantizedTensor:
    scheme = WeightScheme(**{"num_bits": 3, "group_size": 32, **changes})
    return random_tensor("binary_coding", scheme, Shape2D(rows, inputs), seed)


@pytest.mark.parametrize("changes", [{}, {"symmetric": True}, {"group_size": None}], ids=str)
def test_dense_weight_from_tiles_is_the_definition(changes):
    stored = tensor(40, 300, **changes)
    weight = linear_kernels.prepare(stored, torch.float16)
    assert weight.stored is None
    expected = dequantized(stored).half()
    torch.testing.assert_close(weight.dense(), expected, rtol=1e-3, atol=1e-3)


def same(one: KernelWeight, other: KernelWeight) -> bool:
    assert one.tiles is not None and other.tiles is not None
    return (
        one.shape == other.shape
        and torch.equal(one.tiles.planes, other.tiles.planes)
        and torch.equal(one.tiles.scales, other.tiles.scales)
    )


def test_rows_of_a_fused_weight_are_views():
    members = [tensor(rows, seed=rows) for rows in (48, 16, 24)]
    made = fusing.fuse(members, torch.float16)
    assert made is not None
    fused = made.prepared
    for member, part in zip(members, made.parts, strict=True):
        assert part is not None and part.tiles is not None
        assert same(part, linear_kernels.prepare(member, torch.float16))
        storage = fused.tiles.planes.untyped_storage().data_ptr()
        assert part.tiles.planes.untyped_storage().data_ptr() == storage
    assert fusing.rows_of(fused, 8, 16) is None
    assert fusing.rows_of(fused, 0, 24) is None


@pytest.mark.parametrize("rows", [8, 16, 40, 64])
def test_halves_of_an_interleaved_weight_are_gate_and_up(rows):
    members = [tensor(rows, seed=seed) for seed in (1, 2)]
    fused = fusing.fuse(members, torch.float16, interleave=True)
    assert fused is not None
    for part, member in zip(fused.parts, members, strict=True):
        made = part.weight()
        assert same(made, linear_kernels.prepare(member, torch.float16))
        assert made.fresh and not fused.prepared.fresh, "kernels may not read a copy ahead"
        torch.testing.assert_close(part.dense(), dequantized(member).half(), rtol=1e-3, atol=1e-3)


def test_outputs_of_rows_that_alternate_are_brought_side_by_side():
    gate, up, x = normal(24, 5), normal(24, 5, seed=1), normal(3, 5)
    both = torch.cat([gate, up])[fusing.interleaved_order(24)]
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    got = torch_ops.silu_times(layout.side_by_side(x @ both.T))
    torch.testing.assert_close(got, expected)


def load(directory, dtype=torch.float16):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.fixture(scope="module")
def bcq(tiny, tmp_path_factory):
    """Return a function (family, **changes of the recipe) -> quantized checkpoint."""
    from qtool import pipeline
    from qtool.recipe.load import recipe_from_mapping

    def make(family: str = "llama", *, tied: bool = False, overrides=()):
        out_dir = tmp_path_factory.mktemp("quantized") / "checkpoint"
        scheme = {"num_bits": 3, "group_size": 32}
        weights = {"method": "rtn", "scheme": scheme, "overrides": list(overrides)}
        table = {"scheme": {"num_bits": 4, "group_size": 32}}
        ends = {"embedding": table} if tied else {"embedding": table, "head": table}
        recipe = recipe_from_mapping({"weights": weights, **ends})
        pipeline.quantize(Location(tiny(family, tied=tied)), out_dir, recipe)
        return out_dir

    return make


def packed(weights: DecoderWeights) -> list[bool]:
    layer = weights.layers[0]
    parts = [layer.qkv, layer.output, layer.gate_up, layer.down]
    return [isinstance(part, KernelWeight) for part in parts]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_whole_steps_by_kernels(bcq, family):
    directory = bcq(family)
    model, ids = load(directory), prompt(1, 22)
    weights = weights_of(model, backend=cuda.BACKEND)
    assert all(packed(weights))
    launch = Recorder()
    runners = [DecodeRunner(weights, ops, max_length=40) for ops in (OPS, KernelOps(launch, CARD))]
    logits = [[runner.prefill(ids[:, :18]).clone()] for runner in runners]
    begin = len(launch.calls)
    for index in range(18, 22):
        for each, runner in zip(logits, runners, strict=True):
            each.append(runner.step(ids[:, index]).clone())
    torch.testing.assert_close(*map(torch.stack, logits), rtol=0, atol=0.02)
    with use_backend("reference"):
        expected = load(directory)(ids).logits[:, 17:]
    torch.testing.assert_close(torch.stack(logits[1], 1), expected, rtol=0, atol=0.03)
    layer = [
        "bit_plane_codes_mma",
        "decode_attention",
        *["bit_plane_codes_mma"] * 3,
    ]  # norms are in products
    names = launch.names[begin:]
    assert len(names) == 4 * len(names[: len(names) // 4])
    step = names[: len(names) // 4]
    assert "rms_norm" not in step
    assert step[step.index("bit_plane_codes_mma") :][:10] == [*layer, *layer]


def test_layers_of_different_bits_run_apart(bcq):
    rules = [{"match": "*.k_proj", "scheme": {"num_bits": 4}}]
    rules += [{"match": "*.up_proj", "scheme": {"num_bits": 2}}]
    model, ids = load(bcq(overrides=rules)), prompt(1, 12)
    weights = weights_of(model, backend=cuda.BACKEND)
    assert isinstance(weights.layers[0].qkv, tuple)
    assert isinstance(weights.layers[0].gate_up, tuple)
    logits = []
    for ops in (OPS, KernelOps(Recorder(), CARD)):
        runner = DecodeRunner(weights, ops, max_length=40)
        runner.prefill(ids[:, :11])
        logits.append(runner.step(ids[:, 11]).clone())
    torch.testing.assert_close(*logits, rtol=0, atol=0.02)


def test_neighbours_of_one_scheme_stay_one_product(bcq):
    rules = [{"match": "*.v_proj", "scheme": {"group_dim": "out_features"}}]
    model, ids = load(bcq(overrides=rules)), prompt(1, 12)
    weights = weights_of(model, backend=cuda.BACKEND)
    for layer in weights.layers:
        assert isinstance(layer.qkv, tuple)
        both, value = layer.qkv
        assert isinstance(both, KernelWeight) and isinstance(value, KernelWeight)
        assert (both.tiles is None, value.panels is None) == (False, False)
        assert both.shape.out_features == 2 * value.shape.out_features + 32
    logits, launch, begin = [], Recorder(), 0
    for ops in (OPS, KernelOps(launch, CARD)):
        runner = DecodeRunner(weights, ops, max_length=40)
        runner.prefill(ids[:, :11])
        begin = len(launch.names)
        logits.append(runner.step(ids[:, 11]).clone())
    torch.testing.assert_close(*logits, rtol=0, atol=0.02)
    attended = launch.names.index("decode_attention", begin)
    # both norm what they read
    assert launch.names[begin:attended] == ["gather_rows", "bit_plane_codes_mma", "bit_panel_tiles"]


def test_a_kernel_that_reads_stored_parts_gets_each_weight_as_stored(bcq, monkeypatch):
    directory, ids = bcq(), prompt(1, 12)
    expected = load(directory, torch.float32)(ids).logits[:, -1]
    monkeypatch.setenv("QTOOL_KERNEL", "lut")
    weights, launch = weights_of(load(directory), backend=cuda.BACKEND), Recorder()
    layer = weights.layers[0]
    assert isinstance(layer.qkv, tuple) and isinstance(layer.gate_up, tuple)
    parts = [*layer.qkv, *layer.gate_up, layer.output, layer.down, weights.head]
    assert all(isinstance(part, KernelWeight) and part.stored is not None for part in parts)
    runner = DecodeRunner(weights, KernelOps(launch, CARD), max_length=40)
    runner.prefill(ids[:, :11])
    torch.testing.assert_close(runner.step(ids[:, 11]).float(), expected, rtol=0, atol=0.03)
    assert not any("bit_plane" in name for name in launch.names)


@torch.no_grad()
def test_modules_read_the_fused_weights_and_keep_none_of_their_own(bcq):
    with use_backend("dense"):
        model = load(bcq(), torch.float32)
    ids = prompt(1, 12)
    before = model(ids).logits
    weights = weights_of(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    fused = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    for index, member in enumerate(fused):
        _, part = member.prepare(torch.float32)
        owner = weights.layers[0].qkv if index < 3 else weights.layers[0].gate_up
        assert isinstance(owner, torch.Tensor)
        assert part.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
    assert model.model.layers[0].mlp.down_proj.prepare(torch.float32)[1] is weights.layers[0].down
    torch.testing.assert_close(model(ids).logits, before)


ARGUMENTS = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}


def test_a_model_is_pickled_without_layouts_and_decoder(bcq):
    model, ids = load(bcq(), torch.float32), prompt(2, 9)
    before = len(pickle.dumps(model))
    with use_runner("always"):
        expected = model.generate(ids, **ARGUMENTS)
    data = pickle.dumps(model)
    assert len(data) < 1.01 * before
    again = pickle.loads(data)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with use_runner("always"):
        assert torch.equal(again.generate(ids, **ARGUMENTS), expected)


@pytest.fixture
def parts_move(monkeypatch):
    """Let parts that wait be others than those that were loaded, as they are for a card."""
    parts = QuantizedWeight._parts

    def moved(self, device):
        return {name: part.clone() for name, part in parts(self, device).items()}

    monkeypatch.setattr(QuantizedWeight, "_parts", moved)


@pytest.mark.usefixtures("parts_move")
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_a_decoder_is_made_once_and_goes_when_the_model_moves(bcq, backend):
    with use_backend(backend):
        model, ids = load(bcq(), torch.float32), prompt(2, 9)
    decoders: list[Any] = []
    with use_runner("always"):
        for _ in range(3):
            model.generate(ids, **ARGUMENTS)
            decoders.append(generate._MADE[model].decoder)
            model(ids)
            model.to("cpu")
    assert decoders[0] is decoders[1] is decoders[2]
    runner = weakref.ref(decoders[0].runner)
    decoders.clear()
    model.to("meta")
    gc.collect()
    assert runner() is None


def test_other_parts_that_are_loaded_are_decoded(bcq):
    directory, ids = bcq(), prompt(2, 9)
    model, other = (load(directory, torch.float32) for _ in range(2))
    parts = {
        name: 3 * part if name.endswith("up_proj.scales") else part.clone()
        for name, part in other.state_dict().items()
    }
    other.load_state_dict(parts)
    with use_runner("always"):
        before, expected = (each.generate(ids, **ARGUMENTS) for each in (model, other))
        assert not torch.equal(before, expected)
        model.load_state_dict(parts)
        assert torch.equal(model.generate(ids, **ARGUMENTS), expected)


@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_generate_the_same(bcq, tied, backend):
    with use_backend(backend):
        model, ids = load(bcq("llama", tied=tied), torch.float32), prompt(2, 9)
    results = []
    for mode in ("never", "always", "never"):
        with use_runner(mode):
            results.append(accelerate(model).generate(ids, **ARGUMENTS))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
