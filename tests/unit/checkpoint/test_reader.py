import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.checkpoint import writer
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards, read_json
from qtool.errors import CheckpointError, QtoolError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from tests.helpers import recipe

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def sharded_once(llama, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("sharded") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "MAX_SHARD_BYTES", 25_000)
        pipeline.quantize(Location(llama), out_dir, recipe())
    return out_dir


@pytest.fixture
def sharded(sharded_once, tmp_path):
    return Path(shutil.copytree(sharded_once, tmp_path / "sharded"))


def edit_config(directory: Path, change) -> None:
    """Apply `change` to quantization_config."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_index(directory: Path, change) -> None:
    path = directory / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def refused(directory: Path, match: str) -> None:
    """Check that opening is refused in one line, by the reader and by `load_model`."""
    for open_ in (CheckpointReader, lambda path: load_model(Location(path))):
        with pytest.raises(QtoolError, match=match) as caught:
            open_(directory)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        CheckpointReader(directory)


def test_good_checkpoint_opens_and_names_everything_once(checkpoint):
    reader = CheckpointReader(checkpoint)
    names = list(reader.names())
    assert len(names) == len(set(names))
    assert LAYER in names
    assert "model.norm.weight" in names
    assert reader.weight_bytes() == (checkpoint / WEIGHTS).stat().st_size


def test_missing_directory_and_unquantized_model_are_named(tmp_path, llama):
    with pytest.raises(CheckpointError, match="No checkpoint directory"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="isn't quantized"):
        CheckpointReader(llama)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    refused(copy, r"config\.json|holds no safetensors file")


def test_endless_header_is_not_repeated_in_full(copy):
    header = b'{"x":{"dtype":"I8","shape":[],"data_offsets":"' + b"a" * 5000 + b'"}}'
    (copy / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="no safetensors file") as caught:
        CheckpointReader(copy)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(copy, keep):
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: int(keep * len(content))])
    refused(copy, r"model\.safetensors is truncated or no safetensors file")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{\x00}", "\ud800"])
def test_damaged_json_is_refused(copy, content):
    (copy / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(copy, r"config\.json (isn't valid JSON|must hold a JSON object)")


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
def test_missing_part_is_refused_not_filled_with_noise(copy, part):
    tensors = load_file(copy / WEIGHTS)
    del tensors[f"{LAYER}.{part}"]
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    refused(copy, f"tensor {LAYER}.{part} is missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:, :-1].contiguous(),
        lambda t: t.T.contiguous(),
        lambda t: t.float(),
        lambda t: t.view(torch.int16),
        lambda t: t.flatten(),
    ],
)
def test_part_of_another_shape_or_dtype_is_refused(copy, change):
    tensors = load_file(copy / WEIGHTS)
    tensors[f"{LAYER}.scales"] = change(tensors[f"{LAYER}.scales"])
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    refused(copy, rf"{LAYER}\.scales is .*; its scheme needs F16 \(64, 2\)")


@pytest.mark.parametrize("version", [4, 0, -1, 1.0, "1", None, [1]])
def test_unknown_format_version_is_refused(copy, version):
    edit_config(copy, lambda q: q.update(format_version=version))
    refused(copy, "format_version is .*this qtool reads 1 to 3. Upgrade qtool")


def test_newer_codec_is_refused(copy):
    edit_config(copy, lambda q: q["layers"][LAYER].update(codec_version=99))
    refused(copy, "codec affine is version 99, known 1")


@pytest.mark.parametrize("key", ["layers", "recipe", "tool_version"])
def test_missing_key_of_the_manifest_is_refused(copy, key):
    edit_config(copy, lambda q: q.pop(key))
    refused(copy, f"damaged: .*{key}")


HOSTILE_ENTRIES = {
    "zero width": {"shape": [0, 64]},
    "no rows and no group": {"shape": [0, 0]},
    "negative width": {"shape": [64, -64]},
    "three dimensions": {"shape": [64, 64, 1]},
    "text for a width": {"shape": ["64", "64"]},
    "fraction of a width": {"shape": [64.5, 64]},
    "no list of widths": {"shape": 64},
    "huge width": {"shape": [64, 10**30]},
    "unknown format": {"format": "pickle"},
    "path for a format": {"format": "../../methods/rtn"},
    "list for a format": {"format": ["affine"]},
    "nine bits": {"scheme": {"num_bits": 9}},
    "text for bits": {"scheme": {"num_bits": "4", "group_size": 32}},
    "fraction of a bit": {"scheme": {"num_bits": 4.5, "group_size": 32}},
    "fraction of a group": {"scheme": {"num_bits": 4, "group_size": 1.5}},
    "negative group": {"scheme": {"num_bits": 4, "group_size": -1}},
    "unknown dimension": {"scheme": {"num_bits": 4, "group_dim": "sideways"}},
    "unknown key": {"scheme": {"num_bits": 4, "code": "import os"}},
    "scheme of another layer": {"scheme": {"num_bits": 3, "group_size": 32}},
    "no scheme": {"scheme": None},
    "shares its own parts": {"shared_with": LAYER},
    "shares with nobody": {"shared_with": "model.layers.77"},
    "shares with another shape": {"shared_with": "model.layers.0.mlp.down_proj"},
    "number to share with": {"shared_with": 7},
    "text for a version": {"codec_version": "1"},
}


@pytest.mark.parametrize("change", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_hostile_entry_is_refused_in_one_line(copy, change):
    edit_config(copy, lambda q: q["layers"][LAYER].update(change))
    refused(copy, ".")


@pytest.mark.parametrize("value", [None, [], "text", 3, {"x": None}, {"x": []}])
def test_hostile_table_of_layers_is_refused(copy, value):
    edit_config(copy, lambda q: q.update(layers=value))
    refused(copy, "damaged")


def test_layers_that_share_in_a_circle_are_refused(copy):
    other = "model.layers.0.self_attn.o_proj"

    def change(q):
        q["layers"][LAYER]["shared_with"] = other
        q["layers"][other]["shared_with"] = LAYER

    edit_config(copy, change)
    refused(copy, "shares the parts of")


def test_layer_that_the_model_does_not_have_is_refused_at_loading(copy):
    tensors = load_file(copy / WEIGHTS)
    for part in ("codes", "scales", "zero_points"):
        tensors[f"model.layers.9.mlp.{part}"] = tensors[f"{LAYER}.{part}"].clone()
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    edit_config(copy, lambda q: q["layers"].update({"model.layers.9.mlp": q["layers"][LAYER]}))
    with pytest.raises(QtoolError, match=r"model\.layers\.9\.mlp"):
        load_model(Location(copy))


def test_missing_shard_is_named(sharded):
    second = sorted(sharded.glob("*.safetensors"))[1]
    second.unlink()
    refused(sharded, f"{second.name} is missing")


def test_missing_index_is_noticed(sharded):
    (sharded / INDEX).unlink()
    count = len(list(sharded.glob("*.safetensors")))
    refused(sharded, f"has {count} safetensors files but no")


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "."])
def test_index_cannot_point_outside_the_directory(sharded, path):
    edit_index(sharded, lambda m: m.update({f"{LAYER}.codes": path}))
    refused(sharded, "no plain file name")


@pytest.mark.parametrize("value", [7, None, ["model-00001.safetensors"], {}])
def test_index_entry_that_is_no_text_is_refused(sharded, value):
    edit_index(sharded, lambda m: m.update({f"{LAYER}.codes": value}))
    refused(sharded, "no plain file name")


def test_index_that_names_the_wrong_shard_is_refused(sharded):
    def change(weight_map):
        name = f"{LAYER}.codes"
        others = {file for file in weight_map.values() if file != weight_map[name]}
        weight_map[name] = min(others)

    edit_index(sharded, change)
    refused(sharded, "Index and files don't belong together")


@pytest.mark.parametrize("value", [{}, [], None, "x"])
def test_index_without_a_map_is_refused(sharded, value):
    (sharded / INDEX).write_text(json.dumps({"weight_map": value}))
    refused(sharded, "has no weight_map")


def test_file_that_vanishes_after_opening_is_one_sentence(copy):
    reader = CheckpointReader(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"can't read {LAYER}.codes"):
        reader.load(LAYER)


def test_read_json_and_open_shards_name_the_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        open_shards(tmp_path)
