"""config.json: null, wrong types, code, adapters: read as transformers does, or one line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from qtool import pipeline
from qtool.errors import QtoolError
from qtool.modeling.config import parse_config, read_config
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from tests import families
from tests.helpers import recipe


@pytest.fixture
def copy(llama, tmp_path):
    """Return a copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit(directory: Path, drop: str = "", **changes: object) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8-sig")), **changes}
    values.pop(drop, None)
    path.write_text(json.dumps(values))


def refused(directory: Path, match: str) -> None:
    with pytest.raises(QtoolError, match=match) as caught:
        open_source(Location(directory))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("empty", [None, {}])
def test_empty_quantization_config_means_unquantized(copy, tmp_path, empty):
    edit(copy, quantization_config=empty)
    pipeline.quantize(Location(copy), tmp_path / "out", recipe())
    assert load_model(Location(tmp_path / "out")).model.config.num_hidden_layers == 2
    assert load_model(Location(copy)).model.config.num_hidden_layers == 2


@pytest.mark.parametrize("odd", [False, 5, "gptq", [1]])
def test_quantization_config_that_is_no_object_is_refused(copy, odd):
    edit(copy, quantization_config=odd)
    refused(copy, "quantization_config is .*; it must be an object")


@pytest.mark.parametrize(
    ("key", "odd"),
    [
        ("architectures", 5),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [None]),
        ("model_type", 5),
        ("model_type", []),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", None),
        ("num_hidden_layers", -1),
        ("hidden_size", "64"),
        ("hidden_size", 10**30),
        ("num_attention_heads", 0),
        ("vocab_size", None),
        ("vocab_size", 97),
        ("hidden_act", "nonsense"),
        ("hidden_act", 5),
        ("rms_norm_eps", "x"),
        ("rms_norm_eps", {}),
        ("max_position_embeddings", "x"),
        ("rope_scaling", {"rope_type": "nonsense"}),
        ("is_encoder_decoder", True),
    ],
)
def test_key_of_a_wrong_type_is_one_line(copy, key, odd):
    edit(copy, **{key: odd})
    with pytest.raises(QtoolError) as caught:
        open_source(Location(copy))
    assert "\n" not in str(caught.value)


ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
NO_NUMBERS = (0, -1, math.nan, math.inf)


@pytest.mark.parametrize(
    ("key", "odd"),
    [
        *(("partial_rotary_factor", odd) for odd in (-0.25, 0, 3, math.nan, math.inf)),
        *(("rope_theta", odd) for odd in NO_NUMBERS),
        *(("factor", odd) for odd in NO_NUMBERS),
    ],
)
def test_rotary_number_with_which_no_model_runs_is_refused(copy, key, odd):
    edit(copy, rope_parameters={**ROPE, key: odd}, rope_scaling={**ROPE, key: odd})
    edit(copy, **({key: odd} if key != "factor" else {}))
    refused(copy, f"{key} is {odd} in config.json; a number above 0.*is meant")


def test_rotary_numbers_of_a_good_model_are_taken(copy):
    edit(copy, rope_parameters={**ROPE, "partial_rotary_factor": 1})
    assert open_source(Location(copy)).num_blocks == 2


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("odd", "where"),
    [("\ud83d", "x"), ({"a": [1, "b\udc00"]}, r"x\.a\.1"), ({"\ud83d": {}}, r"x\.'?\\ud83d")],
)
def test_half_of_a_surrogate_pair_is_refused_with_file_and_key(copy, name, odd, where):
    values = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**values, "x": odd}))
    refused(copy, f"{name}: '?{where}'? holds half of a surrogate pair")


def test_whole_surrogate_pair_is_text(copy):
    edit(copy, x="\U0001f600")
    assert "\\ud83d" in (copy / "config.json").read_text()
    assert open_source(Location(copy)).config["x"] == "\U0001f600"


@pytest.mark.parametrize("wanted", [10**6, 10**18])
def test_more_blocks_than_tensors_are_refused_at_once(copy, wanted):
    edit(copy, num_hidden_layers=wanted)
    refused(copy, f"config.json names {wanted} blocks, and 21 tensors are stored")


def test_missing_model_type_is_said(copy):
    edit(copy, drop="model_type")
    refused(copy, "has no model_type")


def test_byte_order_mark_that_transformers_cannot_read_is_named(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text("\ufeff" + text, encoding="utf-8")
    refused(copy, "starts with a byte order mark.*without one")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' * 50_000, b"null", b"[]", b'{"a": "\xff"}', b""]
)
def test_json_that_is_no_object_is_one_line(copy, content):
    (copy / "config.json").write_bytes(content)
    refused(copy, r"config\.json (isn't|must)")


@pytest.mark.parametrize("end", ["2", "</s>", [2, "3"], {"a": 1}, 2.5, True])
def test_an_end_that_is_no_token_is_refused_and_a_number_is_not(copy, end):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": end}))
    refused(copy, r"generation_config\.json: eos_token_id is .*number is meant")
    for right in (None, 5, [5, 6], []):
        path.write_text(json.dumps({"eos_token_id": right}))
        read_config(copy)


def test_code_is_named_nowhere_in_a_checkpoint(copy, tmp_path):
    code = {"AutoConfig": "other/repo--configuration.C", "AutoModelForCausalLM": "modeling.M"}
    edit(copy, auto_map=code)
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": code}))
    pipeline.quantize(Location(copy), tmp_path / "out", recipe())
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text(), path.name
    assert load_model(Location(tmp_path / "out")).tokenizer("w5")["input_ids"] == [5]


@pytest.mark.parametrize("key", ["return_dict", "torchscript", "output_hidden_states"])
def test_what_a_model_returns_is_not_for_its_configuration_to_say(copy, tmp_path, key):
    edit(copy, **{key: key != "return_dict"})
    pipeline.quantize(Location(copy), tmp_path / "out", recipe())
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())
    tokens = torch.arange(3, 13)[None]
    for directory in (copy, tmp_path / "out"):
        said = load_model(Location(directory), device="cpu").model(tokens)
        assert said.logits.shape[1] == tokens.shape[1]
        assert said.hidden_states is None


def test_adapter_beside_the_weights_is_refused_and_a_lone_configuration_ignored(copy, tmp_path):
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    loaded = load_model(Location(copy))
    assert loaded.model.name_or_path == loaded.model.config._name_or_path == str(copy)
    assert not getattr(loaded.model, "peft_config", {})
    pipeline.quantize(Location(copy), tmp_path / "out", recipe())
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    (copy / "adapter_model.safetensors").write_bytes(b"")
    refused(copy, "holds an adapter beside the weights.*Merge it")
    with pytest.raises(QtoolError, match="holds an adapter"):
        load_model(Location(copy))


def test_named_file_of_weights_is_refused(copy):
    edit(copy, transformers_weights="other.safetensors")
    refused(copy, r"names a file of weights \(transformers_weights\)")


def test_generation_config_that_is_no_object_is_refused(copy):
    (copy / "generation_config.json").write_text("[1]")
    refused(copy, r"generation_config\.json must hold a JSON object")


def test_facts_come_from_the_class_where_the_file_says_nothing(tmp_path):
    families.build(
        "gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]]
    ).save_pretrained(tmp_path / "neo")
    families.build("mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=48).save_pretrained(
        tmp_path / "mpt"
    )
    for name, positions in (("neo", families.POSITIONS), ("mpt", families.POSITIONS)):
        source = open_source(Location(tmp_path / name))
        assert (source.num_blocks, source.num_positions) == (2, positions), name


def test_parsed_configuration_is_transformers_own(llama):
    parsed = parse_config(read_config(llama), llama)
    assert (parsed.model_type, parsed._name_or_path) == ("llama", str(llama))
