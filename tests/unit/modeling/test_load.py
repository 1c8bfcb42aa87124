import json
import shutil
from pathlib import Path

import pytest
import torch

from qtool.checkpoint.manifest import Manifest
from qtool.errors import ModelError
from qtool.modeling.device import default_dtype
from qtool.modeling.load import load_model, load_tokenizer
from qtool.modeling.locate import Location
from qtool.report.card import model_card


def test_unquantized_and_quantized_models_load_with_their_tokenizer(llama, checkpoint):
    for directory in (llama, checkpoint):
        loaded = load_model(Location(directory))
        assert loaded.name == directory.name
        assert loaded.dtype == default_dtype(loaded.device)
        assert not loaded.model.training
        assert loaded.tokenizer("w5 w6")["input_ids"] == [5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_the_dtype_that_is_asked_for(llama, dtype):
    loaded = load_model(Location(llama), device="cpu", dtype=dtype)
    assert loaded.model.lm_head.weight.dtype == dtype


def test_float16_only_where_it_is_fast():
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("cuda")) == torch.float16


@pytest.fixture
def copy(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_directory_without_a_config_is_no_model(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(Location(copy))


def test_model_that_transformers_does_not_know_is_refused(copy):
    (copy / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="transformers can't use its config"):
        load_model(Location(copy))


def test_missing_tokenizer_is_said(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        load_tokenizer(copy)


def test_remote_code_is_never_run(copy, tmp_path):
    witness = tmp_path / "was-run"
    (copy / "evil.py").write_text(f"open({str(witness)!r}, 'w')")
    text = (copy / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "e"')
    auto = '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, '
    (copy / "config.json").write_text(auto + text.lstrip("{ \n"))
    with pytest.raises(ModelError, match="transformers can't use its config"):
        load_model(Location(copy))
    assert not witness.exists()


@pytest.mark.parametrize(
    ("source", "base"),
    [("someone/model", True), ("demo:smollm2", False), (None, False)],
)
def test_card_names_only_a_public_original(source, base):
    manifest = Manifest(tool_version="1.2.3", recipe={}, layers={}, source=source)
    card = model_card(manifest, source)
    assert ("base_model: someone/model" in card) == base
    assert "1.2.3" in card
    assert card.startswith("---\n")
    assert "library_name: transformers" in card


def test_a_tokenizer_that_makes_no_tokens_is_refused_when_it_is_loaded(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    path = tmp_path / "copy/tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "model_max_length": "long"}))
    with pytest.raises(ModelError, match=r"has no usable tokenizer.*'str'"):
        load_tokenizer(tmp_path / "copy")
