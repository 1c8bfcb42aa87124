"""Names: what the model needs is stored, in its shape; what is stored besides is copied."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import QtoolError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from tests import families
from tests.helpers import recipe

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = torch.arange(3, 23).unsqueeze(0)
TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}


@pytest.fixture
def copy(llama, tmp_path):
    """Return a copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def tied(tiny, tmp_path):
    """Return a copy of a tiny llama whose head is its embedding."""
    return Path(shutil.copytree(tiny("llama", tied=True), tmp_path / "tied"))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file(change(tensors), directory / WEIGHTS, {"format": "pt"})


def edit_config(directory: Path, drop: str = "", **changes: object) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    values.pop(drop, None)
    path.write_text(json.dumps(values))


def refused(directory: Path, match: str) -> None:
    """Check that quantizing and evaluating are refused, in one line that says the same."""
    for open_ in (open_source, load_model):
        with pytest.raises(QtoolError, match=match) as caught:
            open_(Location(directory))
        assert "\n" not in str(caught.value)


@torch.inference_mode()
def logits(directory: Path) -> torch.Tensor:
    return load_model(Location(directory), device="cpu").model(PROMPT, use_cache=False).logits


def same_model(source: Path, tmp_path: Path, **sections: Any) -> None:
    """Check that 8 bits of a source are the model that transformers loads from it."""
    pipeline.quantize(Location(source), tmp_path / "out", recipe(num_bits=8, **sections))
    expected, found = logits(source), logits(tmp_path / "out")
    assert float((found - expected).norm() / expected.norm()) < 0.05


def without(*parts: str):
    return lambda tensors: {n: t for n, t in tensors.items() if not any(p in n for p in parts)}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (["model.norm"], r"stored: model\.norm\.weight\."),
        (["input_layernorm"], r"layers\.0\.input_layernorm\.weight, .*layers\.1\.input"),
        (["norm"], r"layers\.0\.input_layernorm\.weight, .* and 2 more"),
        (["q_proj"], r"q_proj\.weight"),
        (["lm_head"], r"stored: lm_head\.weight"),
    ],
)
def test_missing_tensors_are_named(copy, parts, named):
    edit_tensors(copy, without(*parts))
    refused(copy, f"the model needs tensors that aren't .*{named}")


def test_biases_that_the_configuration_wants_are_named(copy):
    edit_config(copy, attention_bias=True)
    refused(copy, r"aren't stored: .*q_proj\.bias.* and 5 more|aren't stored: .*_proj\.bias")


def test_foreign_prefix_is_shown(copy):
    edit_tensors(copy, lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()})
    refused(copy, r"_orig_mod\.")


def test_other_shapes_are_named(copy):
    def longer(tensors):
        return {**tensors, "model.norm.weight": torch.ones(65)}

    edit_tensors(copy, longer)
    refused(
        copy,
        r"shapes? of model\.norm\.weight (is \(65,\), and|aren't those that) config\.json makes",
    )


def test_blocks_beyond_those_of_the_configuration_are_copied(copy, tmp_path):
    edit_config(copy, num_hidden_layers=1)
    same_model(copy, tmp_path)
    reader = CheckpointReader(tmp_path / "out")
    assert len(reader.manifest.layers) == 7
    assert "model.layers.1.mlp.up_proj.weight" in {*reader.names()}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.x.foo",
        "model.layers.999999999999.a",
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.a",
        "model.layers",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "mtp.layers.0.mlp.up_proj.weight",
        "日本",
        "a\nb",
    ],
)
def test_what_is_stored_besides_is_copied(copy, tmp_path, name):
    edit_tensors(copy, lambda tensors: {**tensors, name: torch.ones(3)})
    same_model(copy, tmp_path)
    kept: Any = CheckpointReader(tmp_path / "out").load(name)
    assert torch.equal(kept, torch.ones(3))


def test_head_is_tied_only_as_the_class_says(copy, tmp_path):
    edit_config(copy, drop="tie_word_embeddings")  # Llama's default: not tied
    assert not open_source(Location(copy)).head_is_tied
    same_model(copy, tmp_path, embedding=TABLE, head=TABLE)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_class_that_ties_by_default_does_so_without_the_key(tiny, tmp_path):
    directory = Path(shutil.copytree(tiny("gemma", tied=True), tmp_path / "gemma"))
    edit_config(directory, drop="tie_word_embeddings")
    assert open_source(Location(directory)).head_is_tied
    same_model(directory, tmp_path, embedding=TABLE)


def test_head_that_is_stored_with_values_of_its_own_follows_transformers(tied, tmp_path):
    import transformers

    edit_tensors(tied, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].flip(0)})
    looks_at_values = hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys")
    assert open_source(Location(tied)).head_is_tied != looks_at_values
    same_model(tied, tmp_path, embedding=TABLE)


def test_head_that_is_stored_with_the_same_values_is_tied(tied, tmp_path):
    edit_tensors(tied, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()})
    assert open_source(Location(tied)).head_is_tied
    same_model(tied, tmp_path, embedding=TABLE)


def test_embedding_that_is_stored_as_the_head_is_found(tied, tmp_path):
    import transformers

    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 loads noise in its place")
    edit_tensors(tied, lambda tensors: {**without(EMBEDDING)(tensors), HEAD: tensors[EMBEDDING]})
    same_model(tied, tmp_path, embedding=TABLE)
    assert HEAD not in {*CheckpointReader(tmp_path / "out").names()} - {"lm_head"}


def test_tied_head_keeps_its_bias(tmp_path):
    families.build("phi", tied=True).save_pretrained(tmp_path / "phi")
    plan = pipeline.plan(Location(tmp_path / "phi"), recipe(embedding=TABLE))
    assert (plan.tied_head, "lm_head.bias" in plan.kept) == ("lm_head", True)


def test_single_file_comes_before_an_index(copy, tmp_path):
    old = {n: torch.zeros_like(t) for n, t in load_file(copy / WEIGHTS).items()}
    save_file(old, copy / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (copy / INDEX).write_text(json.dumps(index))
    same_model(copy, tmp_path)
    (copy / "model-00001-of-00001.safetensors").unlink()
    assert open_source(Location(copy)).num_blocks == 2


def test_other_file_names_are_refused_as_transformers_does(copy):
    (copy / WEIGHTS).rename(copy / "model.fp16.safetensors")
    refused(copy, r"has 1 safetensors files but no .*none is called model\.safetensors")


def test_all_tensors_of_the_files_of_an_index_count(copy):
    (copy / WEIGHTS).rename(copy / "part.safetensors")
    index = {"metadata": {}, "weight_map": {EMBEDDING: "part.safetensors"}}
    (copy / INDEX).write_text(json.dumps(index))
    assert len(open_source(Location(copy)).shards.specs) == 21


@pytest.mark.parametrize(
    "place", [None, 5, "../x.safetensors", "", "a\x00b", "x" * 5000, "\ud800", ["a"], "/etc/passwd"]
)
def test_index_that_names_no_file_is_one_line(copy, place):
    (copy / WEIGHTS).unlink()
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {EMBEDDING: place}}))
    refused(copy, "no plain file name|is missing|half of a surrogate pair")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": "b"}}, {"a": 1}])
def test_index_without_what_it_needs_is_one_line(copy, content):
    (copy / WEIGHTS).unlink()
    (copy / INDEX).write_text(json.dumps(content))
    refused(copy, "has no weight_map|has no metadata")


def test_tensor_in_two_files_is_refused(copy):
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).rename(copy / "a.safetensors")
    save_file({HEAD: tensors[HEAD] + 1}, copy / "b.safetensors", {"format": "pt"})
    files = dict.fromkeys(tensors, "a.safetensors") | {HEAD: "b.safetensors"}
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    refused(copy, r"lm_head\.weight is stored both in .*a\.safetensors and in b\.safetensors")


def test_two_stored_names_of_one_tensor_are_refused(copy):
    edit_tensors(copy, lambda t: {**t, "norm.weight": t["model.norm.weight"] + 1})
    with pytest.raises(QtoolError, match=r"Both model\.norm\.weight and norm\.weight are stored"):
        open_source(Location(copy))
