"""Mixtures of experts: quantize, reload, compare with the files as transformers runs its own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.experts import expert_name
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.modules import QuantizedLinear, QuantizedWeight
from tests import families, mixtures
from tests.helpers import QUICK_BCQ, dequantized

transformers = pytest.importorskip("transformers", minversion="5.0")

PROMPT = torch.arange(3, 23).unsqueeze(0)
BY_BCQ = ("qwen3_moe", "gpt_oss")


def load(directory, backend="dense"):
    """Load a model whose products are torch's: what is compared is what was loaded."""
    with use_backend(backend):
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model):
    return model(PROMPT, use_cache=False).logits


def quantize(directory, name, out, **sections):
    text = directory / "text.txt"
    text.write_text(families.text(600))
    samples = {"dataset": str(text), "num_samples": 6, "sequence_length": 24, "holdout": 0.34}
    calibrated = sections.pop("calibrated")
    method = "rtn" if not calibrated else "bcq" if name in BY_BCQ else "gptq"
    options = dict(QUICK_BCQ) if method == "bcq" else {}
    calibration = {"calibration": samples} if calibrated else {}
    weights = {"method": method, "scheme": {"num_bits": 3, "group_size": 32}, "options": options}
    made = recipe_from_mapping({"weights": {**weights, **sections}, **calibration})
    return pipeline.quantize(Location(directory / "source"), out, made)


@pytest.fixture(scope="module", params=list(mixtures.MIXTURES))
def source(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    mixtures.build(request.param).save_pretrained(directory / "source")
    families.save_tokenizer(directory / "source")
    return SimpleNamespace(name=request.param, directory=directory)


@pytest.fixture(scope="module", params=[False, True], ids=["data-free", "calibrated"])
def case(source, request):
    out = source.directory / f"out-{request.param}"
    result = quantize(source.directory, source.name, out, calibrated=request.param)
    return SimpleNamespace(
        original=load(source.directory / "source"),
        quantized=load(out),
        reader=CheckpointReader(out),
        result=result,
        calibrated=request.param,
        out=out,
    )


def test_logits_equal_those_of_transformers_own_experts_with_dequantized_weights(case):
    """The oracle is the fused model: each expert's stored weight is written into its slice."""
    with torch.no_grad():
        for name in case.reader.manifest.layers:
            weight = dequantized(case.reader.load(name))
            mixtures.fused_weight(case.original, name).copy_(weight)
    torch.testing.assert_close(logits(case.quantized), logits(case.original), rtol=1e-4, atol=1e-5)


def test_the_backend_chosen_for_a_cpu_says_nearly_the_same(case):
    said, expected = logits(load(case.out, backend=None)), logits(case.quantized)
    assert float((said - expected).norm()) <= 1e-3 * float(expected.norm())


def test_every_expert_is_a_layer_and_what_stands_beside_them_is_not(case):
    names = [name for name in case.reader.manifest.layers if expert_name(name)]
    blocks = 1 if any(kind in case.out.parent.name for kind in ("qwen2_moe", "deepseek")) else 2
    assert len(names) == blocks * 2 * 4
    left = {n for n, m in case.quantized.named_modules() if type(m) is nn.Linear}
    assert all("shared" in name or name == "lm_head" for name in left)
    assert not any("router" in name or name.endswith("mlp.gate") for name in names)


def test_a_loaded_model_takes_what_is_stored_and_no_more(case):
    modules = [m for m in case.quantized.modules() if isinstance(m, QuantizedWeight)]
    packed = sum(b.numel() * b.element_size() for m in modules for b in m.buffers(recurse=False))
    assert packed == sum(entry.num_bytes() for entry in case.reader.manifest.layers.values())
    matrices = {n for n, p in case.quantized.named_parameters() if "experts" in n and p.dim() > 1}
    assert all(name.endswith("_bias") or "shared" in name for name in matrices)


def test_it_generates_and_survives_being_saved_again(case, tmp_path):
    with torch.inference_mode():
        tokens = case.quantized.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=3, do_sample=False
        )
        whole = case.quantized(tokens[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(whole[:, PROMPT.shape[1] - 1 :], tokens[:, PROMPT.shape[1] :])
    case.quantized.save_pretrained(tmp_path)
    again = CheckpointReader(tmp_path)  # routers may be called as the model calls them
    assert set(again.manifest.layers) == set(case.reader.manifest.layers)
    assert again.manifest.format_version == 3
    assert torch.equal(logits(load(tmp_path)), logits(case.quantized))


def test_calibration_tokens_of_each_expert_are_reported(case):
    if not case.calibrated:
        assert case.result.experts == {}
        return
    per_token = 1 if "llama4" in case.out.parent.name else 2
    for part in case.result.experts.values():
        assert len(part["tokens"]) == 4
        assert sum(part["tokens"]) == per_token * 4 * 24  # of the samples that aren't held out
        for layer, chosen in part["starved"].items():
            assert expert_name(layer) is not None
            assert chosen in ("routed", "all", "pooled")


def test_a_recipe_can_leave_out_experts_and_name_shared_ones(source):
    out = source.directory / "some"
    overrides = [
        {"match": "*.gate_up_proj[0]", "skip": True},
        {"match": "*.shared_expert*", "scheme": {"num_bits": 8}},
    ]
    has_shared = any(kind in source.name for kind in ("qwen2_moe", "deepseek", "llama4"))
    quantize(
        source.directory, source.name, out, calibrated=False, overrides=overrides[: 1 + has_shared]
    )
    model, original = load(out), load(source.directory / "source")
    modules = dict(model.named_modules())
    (left, *_) = [n for n in modules if n.endswith("gate_up_proj[0]")]
    assert type(modules[left]) is nn.Linear
    assert torch.equal(modules[left].weight, mixtures.fused_weight(original, left))
    shared = [m for n, m in modules.items() if "shared_expert" in n and n.endswith("down_proj")]
    assert all(isinstance(m, QuantizedLinear) for m in shared)
    assert bool(shared) == has_shared


def test_without_any_expert_the_files_keep_their_tensors(source):
    out = source.directory / "none"
    skip = [
        {"match": "*.gate_up_proj", "skip": True},
        {"match": "*experts.down_proj", "skip": True},
    ]
    quantize(source.directory, source.name, out, calibrated=False, overrides=skip)
    reader: Any = CheckpointReader(out)
    original = load(source.directory / "source")
    assert reader.manifest.layers and not any("[" in name for name in reader.names())
    assert reader.manifest.format_version == 1
    with torch.no_grad():
        for name in reader.manifest.layers:
            original.get_submodule(name).weight.copy_(dequantized(reader.load(name)))
    torch.testing.assert_close(logits(load(out)), logits(original), rtol=1e-4, atol=1e-5)
