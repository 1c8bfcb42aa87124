"""Experts as other programs see them: names, rows and values, against transformers' own files."""

import pytest
import torch

from qtool import pipeline
from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards
from qtool.errors import CheckpointError, RecipeError
from qtool.exchange import load_exchange
from qtool.modeling.locate import Location
from qtool.pipeline.export import open_departure
from qtool.recipe.load import recipe_from_mapping
from tests import families, mixtures
from tests.every_family import load, logits
from tests.helpers import dequantized, recipe

pytest.importorskip("transformers", minversion="5.0")

APART = ["mixtral", "qwen3_moe", "deepseek_v3"]
JOINED = ["granitemoe", "gpt_oss", "llama4_text"]


def quantized(name, place, **override):
    mixtures.build(name).save_pretrained(place / "source")
    families.save_tokenizer(place / "source")
    scheme = {"num_bits": 4, "group_size": 32, "symmetric": True}
    weights = {"method": "rtn", "scheme": scheme, "overrides": [override] if override else []}
    wanted = recipe_from_mapping({"weights": weights})
    pipeline.quantize(Location(place / "source"), place / "out", wanted)
    return place / "out"


@pytest.mark.parametrize("name", [*APART, *JOINED])
def test_dense_files_are_laid_out_as_the_originals_and_say_the_same(name, tmp_path):
    out = quantized(name, tmp_path)
    pipeline.export(out, tmp_path / "dense", "dense", dtype="float32")
    wrote, original = open_shards(tmp_path / "dense").specs, open_shards(tmp_path / "source").specs
    assert {n: spec.shape for n, spec in wrote.items()} == {
        n: spec.shape for n, spec in original.items()
    }
    ours, theirs = logits(load(out)), logits(load(tmp_path / "dense"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_codes_of_an_expert_go_to_the_linears_that_files_have(target, tmp_path):
    out = quantized("mixtral", tmp_path, match="*.experts.*[2]", skip=True)
    pipeline.export(out, tmp_path / "there", target)
    read = load_exchange(target).read
    assert read is not None
    there = read(tmp_path / "there")
    layer = "model.layers.1.{}.experts"
    ours = CheckpointReader(out)
    held = ours.load(layer.format("mlp") + ".gate_up_proj[1]")
    assert isinstance(held, QuantizedTensor)
    gate_up = dequantized(held)
    inner = layer.format("block_sparse_moe")
    gate, up = (dequantized(there.layers[f"{inner}.1.{name}"]()) for name in ("w1", "w3"))
    assert torch.equal(torch.cat([gate, up]), gate_up)
    assert f"{inner}.2.w1" not in there.layers
    assert torch.equal(
        open_shards(tmp_path / "there").read(f"{inner}.2.w1.weight"),
        open_shards(tmp_path / "source").read(f"{inner}.2.w1.weight"),
    )
    if target == "compressed-tensors":
        assert f"{inner}.2.w1" in open_departure(out, None, print).linears


def test_experts_in_one_tensor_are_refused_before_the_work_and_after(tmp_path):
    out = quantized("gpt_oss", tmp_path)
    with pytest.raises(CheckpointError, match=r"gptq can't say the experts .*gate_up_proj"):
        pipeline.export(out, tmp_path / "there", "gptq")
    with pytest.raises(RecipeError, match="--target dense takes them"):
        pipeline.quantize(
            Location(tmp_path / "source"), tmp_path / "again", recipe(num_bits=4), target="gptq"
        )
