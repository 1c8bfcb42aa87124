"""Types and names in the manifest, parts that belong to nobody, values, digests."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool.base import PartSpec
from qtool.checkpoint.manifest import manifest_from_config
from qtool.checkpoint.reader import CheckpointReader, check_values, tensor_digest
from qtool.errors import CheckpointError

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(directory: Path, change) -> None:
    """Apply `change` to quantization_config."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def refused(directory: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointReader(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


WRONG_TYPES = [
    ("symmetric", "false"),
    ("symmetric", 0),
    ("symmetric", None),
    ("group_size", 32.0),
    ("group_size", True),
    ("group_size", "32"),
    ("group_size", 2**31),
    ("num_bits", 4.0),
    ("num_bits", True),
    ("group_dim", ["in_features"]),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_wrong_type_in_a_scheme_names_layer_and_key(copy, key, value):
    edit(copy, lambda q: q["layers"][LAYER]["scheme"].update({key: value}))
    refused(copy, f"damaged: layer {LAYER}: {key} is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("group_dim", "a" * 5000), ("group_size", -(10**3000)), ("num_bits", 10**3000)],
)
def test_long_value_in_a_scheme_is_shown_shortened(copy, key, value):
    edit(copy, lambda q: q["layers"][LAYER]["scheme"].update({key: value}))
    refused(copy, f"damaged: layer {LAYER}: {key} is .*\\.\\.\\.")


def test_long_name_of_a_layer_is_shown_shortened(copy):
    edit(copy, lambda q: q["layers"].update({"a" * 5000: q["layers"][LAYER]}))
    refused(copy, r"tensor a+\.\.\. is missing")
    edit(copy, lambda q: q["layers"][LAYER].update(shared_with="b" * 5000))
    refused(copy, r"shares the parts of b+\.\.\., which isn't there")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_number_that_json_does_not_know_is_refused_in_the_recipe(copy, value):
    edit(copy, lambda q: q["recipe"]["weights"]["scheme"].update({"num_bits": value}))
    refused(copy, f"damaged: recipe.weights.scheme.num_bits is {value}; JSON has finite numbers")


@pytest.mark.parametrize("key", ["num_bits", "group_size", "group_dim", "symmetric"])
def test_key_that_a_scheme_lacks_is_refused(copy, key):
    edit(copy, lambda q: q["layers"][LAYER]["scheme"].pop(key))
    refused(copy, f"the key '{key}' of scheme is missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", 5),
        ("calibration", []),
        ("recipe", 5),
        ("recipe", None),
        ("tool_version", 1.0),
        ("digests", []),
        ("digests", {"x": 5}),
    ],
)
def test_wrong_type_of_a_key_is_refused(copy, key, value):
    edit(copy, lambda q: q.update({key: value}))
    refused(copy, f"damaged: {key} ")


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[31m", "\ud800"])
def test_layer_whose_name_cannot_be_printed_is_refused(copy, name):
    edit(copy, lambda q: q["layers"].update({name: q["layers"][LAYER]}))
    refused(copy, "is no name of a layer|holds half of a surrogate pair")


@pytest.mark.parametrize("value", [None, {}, [], "qtool", 7])
def test_configuration_that_is_no_object_of_ours_is_one_sentence(copy, value):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": value}))
    said = "isn't quantized" if value in (None, {}) else "quantization_config is .*an object"
    refused(copy, said)


@pytest.mark.parametrize("value", [{"bits": 4}, {"quant_method": None}, {"quant_method": ""}])
def test_other_programs_configuration_is_told_from_a_damaged_one(copy, value):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": value}))
    said = "quant_method is ''" if value.get("quant_method") == "" else "names no quant_method"
    refused(copy, f"{said}.*`qtool import`")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ENTRY: dict[str, Any] = {
    "format": "affine",
    "codec_version": 1,
    "method": "rtn",
    "shape": [64, 64],
    "scheme": {"num_bits": 4, "group_size": 32, "group_dim": "in_features", "symmetric": False},
}
PLACES = [("layers",), ("recipe",), *(("layers", "x", key) for key in ENTRY)]
PLACES += [("layers", "x", "scheme", key) for key in ENTRY["scheme"]]


@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_anywhere_is_read_as_it_is_or_refused_in_one_line(place, value):
    config: dict[str, Any] = {
        "quant_method": "qtool",
        "format_version": 1,
        "tool_version": "1",
        "recipe": {},
    }
    config["layers"] = {"x": json.loads(json.dumps(ENTRY))}
    *path, last = place
    holder: Any = config
    for key in path:
        holder = holder[key]
    holder[last] = value
    try:
        manifest = manifest_from_config(config, "here")
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert json.dumps(manifest.to_config()["layers"]) == json.dumps(config["layers"])


def test_parts_without_an_entry_are_refused(copy):
    edit(copy, lambda q: q["layers"].pop(LAYER))
    refused(copy, rf"{LAYER}\.(codes|zero_points) belongs to a quantized layer that")


def test_part_that_the_scheme_has_no_room_for_is_refused(copy):
    edit(copy, lambda q: q["layers"][LAYER]["scheme"].update(symmetric=True))
    refused(copy, rf"{LAYER}\.zero_points is no part of a layer")


def test_weight_beside_its_parts_is_refused(copy):
    edit_tensors(copy, lambda t: t.update({f"{LAYER}.weight": torch.zeros(64, 64)}))
    refused(copy, rf"{LAYER}\.weight is no part of a layer")


def test_tensors_that_only_sound_like_parts_are_read(copy):
    edit_tensors(copy, lambda t: t.update({"model.router.scales": torch.ones(3)}))
    assert "model.router.scales" in set(CheckpointReader(copy).names())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_do_not_scale_are_refused_when_they_are_read(copy, value):
    edit_tensors(copy, lambda t: t[f"{LAYER}.scales"][3].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.scales holds values from .* are meant"):
        CheckpointReader(copy).load(LAYER)


def test_offsets_may_be_negative_but_not_infinite():
    spec = PartSpec("float16", (2,))
    check_values("x", spec, torch.tensor([-65504.0, 65504.0]).half())
    with pytest.raises(CheckpointError, match="finite ones are meant"):
        check_values("x", spec, torch.tensor([0, -float("inf")]).half())


def test_digest_is_that_of_the_bytes_in_the_file(checkpoint):
    import hashlib

    from safetensors import deserialize

    content = deserialize((checkpoint / WEIGHTS).read_bytes())
    raw = {name: hashlib.sha256(bytes(value["data"])).hexdigest() for name, value in content}
    read = {name: tensor_digest(tensor) for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    assert read == raw


def note_digests(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    edit(directory, lambda q: q.update(digests=digests))


def test_whole_checkpoint_is_verified(copy):
    note_digests(copy)
    assert CheckpointReader(copy).verify() == len(load_file(copy / WEIGHTS))


@pytest.mark.parametrize("name", [f"{LAYER}.codes", "model.norm.weight"])
def test_one_changed_bit_is_found(copy, name):
    note_digests(copy)
    edit_tensors(copy, lambda t: t[name].view(torch.int16)[:1].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=f"copy: {name} isn't what was written"):
        CheckpointReader(copy).verify()


def test_tensor_too_many_and_tensor_too_few_are_found(copy):
    note_digests(copy)
    edit_tensors(copy, lambda t: (t.pop("model.norm.weight"), t.update(more=torch.ones(1))))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight, more aren't what was"):
        CheckpointReader(copy).verify()


def test_checkpoint_without_digests_is_not_called_whole(copy):
    edit(copy, lambda q: q.pop("digests", None))
    with pytest.raises(CheckpointError, match="has no digests to compare"):
        CheckpointReader(copy).verify()


ACTIVATION = {
    "num_bits": 8,
    "granularity": "tensor",
    "clip_ratio": 1.0,
    "rounding": 0.0,
    "scale": 0.125,
}


def _with_activation(version: int, **changes: Any) -> dict[str, Any]:
    entry = {**json.loads(json.dumps(ENTRY)), "activation": {**ACTIVATION, **changes}}
    return {
        "quant_method": "qtool",
        "format_version": version,
        "tool_version": "1",
        "recipe": {},
        "layers": {"x": entry},
    }


def test_quantized_inputs_come_back_as_they_were_and_make_it_version_2():
    config = manifest_from_config(_with_activation(2), "here").to_config()
    assert config["format_version"] == 2
    assert config["layers"]["x"]["activation"] == ACTIVATION


@pytest.mark.parametrize(
    ("version", "changes", "match"),
    [
        (1, {}, "version 1 of the format has no layers whose inputs are quantized"),
        (2, {"scale": None}, "activations per tensor have a scale"),
        (2, {"scale": 1}, "scale is 1; a number with a decimal point or null is meant"),
        (2, {"granularity": "channel"}, "granularity of activations is 'channel'"),
        (2, {"offset": 1}, "the key 'offset' of activation is unknown"),
    ],
)
def test_odd_quantized_inputs_are_refused(version, changes, match):
    with pytest.raises(CheckpointError, match=match):
        manifest_from_config(_with_activation(version, **changes), "here")


@pytest.mark.parametrize("tokens_from", [None, "all", "pooled"])
def test_layers_of_single_experts_make_it_version_3(tokens_from):
    name, config = "model.layers.0.mlp.experts.down_proj[7]", _with_activation(3)
    said = {} if tokens_from is None else {"tokens_from": tokens_from}
    config["layers"] = {name: {**ENTRY, **said}}
    manifest = manifest_from_config(config, "here")
    assert manifest.layers[name].tokens_from == tokens_from
    again = manifest.to_config()
    assert again["format_version"] == 3
    assert again["layers"][name].get("tokens_from") == tokens_from
    config["format_version"] = 2
    with pytest.raises(CheckpointError, match=r"version 2 .* has no layers of single experts"):
        manifest_from_config(config, "here")
