"""A model of formats as GGUF has them, decoded: by planes, but for what is in groups of 16."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.formats.minima import encode_minima
from qtool.formats.nested import encode_nested
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.inspect import memory_of
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda import driver
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.scheme import WeightScheme
from tests.helpers import dequantized
from tests.kernels.host import Recorder
from tests.runtime_decode.models import prompt
from tests.unit.runtime.test_card_memory import tensors_in

CARD = Card(multiprocessors=2, shared_bytes=227 * 1024)
KINDS = {"0.self_attn.v_proj": "Q6_K", "0.mlp.down_proj": "Q6_K", "1.mlp.down_proj": "Q5_1"}


def quantized(weight: torch.Tensor, kind: str) -> QuantizedTensor:
    """Return a weight in the grids of a GGUF type, to the nearest: Q4_K where it isn't another."""
    if kind == "Q6_K":
        groups = weight.unflatten(1, (-1, 16))
        steps = groups.abs().amax(-1) / 31
        whole = (steps.amax(-1, keepdim=True) / 127).half()
        multiples = (steps / whole.float()).round().clamp(1, 127)
        codes = (groups / (multiples * whole.float())[..., None]).round().clamp(-32, 31) + 32
        scheme = WeightScheme(num_bits=6, group_size=16, symmetric=True)
        scales = ((multiples + 128).to(torch.uint8), whole)
        return encode_nested(codes.flatten(1).to(torch.uint8), scales, None, scheme)
    num_bits = 5 if kind == "Q5_1" else 4
    scheme, groups = WeightScheme(num_bits=num_bits, group_size=32), weight.unflatten(1, (-1, 32))
    low = groups.amin(-1).clamp(max=0)
    steps = (groups.amax(-1) - low) / (2**num_bits - 1)
    if kind == "Q5_1":
        steps, low = steps.half(), low.half()
        codes = ((groups - low[..., None].float()) / steps[..., None].float()).round()
        codes = codes.clamp(0, 31).flatten(1).to(torch.uint8)
        return encode_minima(codes, steps, low, scheme)
    wholes = [(each.amax(-1, keepdim=True) / 63).half() for each in (steps, -low)]
    pairs = zip((steps, -low), wholes, strict=True)
    multiples = [(each / whole.float()).round().clamp(1, 63) for each, whole in pairs]
    found, lows = (m * whole.float() for m, whole in zip(multiples, wholes, strict=True))
    codes = ((groups + lows[..., None]) / found[..., None]).round().clamp(0, 15)
    scales, minima = zip([each.to(torch.uint8) for each in multiples], wholes, strict=True)
    return encode_nested(codes.flatten(1).to(torch.uint8), scales, minima, scheme)


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory):
    """Return a tiny llama whose linears are of formats `nested` and `minima`."""
    out_dir = tmp_path_factory.mktemp("imported") / "checkpoint"
    shutil.copytree(checkpoint, out_dir)
    reader, tensors = CheckpointReader(checkpoint), load_file(out_dir / "model.safetensors")
    config = json.loads((out_dir / "config.json").read_text())
    section = config["quantization_config"]
    for name, entry in reader.manifest.layers.items():
        for part in entry.layout():
            del tensors[f"{name}.{part}"]
        kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), "Q4_K")
        was = reader.load(name)
        assert isinstance(was, QuantizedTensor)
        tensor = quantized(dequantized(was), kind)
        tensors |= {f"{name}.{part}": values for part, values in tensor.parts.items()}
        changed = {"format": tensor.format, "scheme": tensor.scheme.to_json()}
        section["layers"][name] |= changed
    section.pop("digests", None)
    (out_dir / "config.json").write_text(json.dumps(config))
    save_file(tensors, out_dir / "model.safetensors", {"format": "pt"})
    return out_dir


def load(directory, dtype, device="cpu"):
    return load_model(Location(directory), device=torch.device(device), dtype=dtype).model


def exact_logits(directory, ids):
    with use_backend("reference"):
        return load(directory, torch.float32)(ids).logits[:, 11:]


def check_kinds(weights):
    """Compare with what `KINDS` leaves to the kernels."""
    first, second = weights.layers
    tiled = [first.output, first.gate_up, second.qkv, second.gate_up, second.down]
    assert all(isinstance(each, KernelWeight) and each.tiles is not None for each in tiled)
    assert [isinstance(each, KernelWeight) for each in first.qkv] == [True, False]
    assert isinstance(first.down, torch.Tensor)


@torch.no_grad()
def test_whole_steps_by_kernels(imported, monkeypatch):
    monkeypatch.setattr(cuda, "why_not_on", lambda _: None)
    ids, launch = prompt(2, 14), Recorder()
    weights = weights_of(load(imported, torch.float16))
    check_kinds(weights)
    runner = DecodeRunner(weights, KernelOps(launch, CARD), max_length=20, batch=2)
    logits = [runner.prefill(ids[:, :12]).clone()]
    logits += [runner.step(ids[:, index]).clone() for index in (12, 13)]
    expected = exact_logits(imported, ids)
    torch.testing.assert_close(torch.stack(logits, 1).float(), expected, rtol=0, atol=0.03)
    assert "bit_plane_mma" in launch.names and "sign_flip" not in launch.names


@torch.no_grad()
def test_memory_is_what_the_decoder_reads(imported, monkeypatch):
    monkeypatch.setattr(cuda, "why_not_on", lambda _: None)
    weights = weights_of(load(imported, torch.float16))
    memory = memory_of(CheckpointReader(imported))
    assert memory is not None
    rotary = tensors_in(weights.inverse_frequencies)
    assert memory.weight_bytes == sum(tensors_in(weights).values()) - sum(rotary.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_model_decodes_on_a_card(imported, dtype, batch):
    pytest.importorskip("cupy")
    model, ids = load(imported, dtype, "cuda"), prompt(batch, 40).cuda()
    expected, exact = model(ids).logits[:, 11:], exact_logits(imported, ids.cpu())
    atol = 0.03 if dtype == torch.float16 else 0.2
    torch.testing.assert_close(expected.cpu().float(), exact, rtol=0, atol=atol)
    weights = weights_of(model)
    check_kinds(weights)
    ops = KernelOps(driver.launch, driver.card_of(0))
    runner = DecodeRunner(weights, ops, max_length=64, batch=batch)
    logits = [runner.prefill(ids[:, :12]).clone()]
    logits += [runner.step(tokens).clone() for tokens in ids[:, 12:].T]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=atol)
    assert runner.captured.recorded is not None, "a step is one graph"
