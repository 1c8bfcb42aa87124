import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.errors import MethodError
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from tests.helpers import recipe, steps_in, warnings_in

LINEAR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def spoil(directory: Path, value: float, dtype: torch.dtype = torch.float16) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[LINEAR] = tensors[LINEAR].to(dtype)
    tensors[LINEAR][3, 5] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("method", ["rtn", "bcq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_refused_and_named(copy, tmp_path, method, value):
    spoil(copy, value)
    with pytest.raises(MethodError, match="up_proj: 1 of 6144 weights are NaN or infinite"):
        pipeline.quantize(Location(copy), tmp_path / "out", recipe(method))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "bcq"])
def test_weight_too_large_for_float16_scales_is_refused_with_the_way_out(copy, tmp_path, method):
    spoil(copy, 1e9, torch.float32)
    with pytest.raises(MethodError, match=r"doesn't fit float16; .* 1e\+09\. Skip this layer"):
        pipeline.quantize(Location(copy), tmp_path / "out", recipe(method, 2))
    skip = [{"match": LINEAR.removesuffix(".weight"), "skip": True}]
    weights = {"method": method, "scheme": {"num_bits": 2, "group_size": 32}, "overrides": skip}
    result = pipeline.quantize(
        Location(copy), tmp_path / "out", recipe_from_mapping({"weights": weights}), overwrite=True
    )
    assert len(result.layers) == 13


@pytest.mark.parametrize("method", ["rtn", "bcq"])
@pytest.mark.parametrize(("factor", "is_told"), [(1e-7, True), (0.0, False), (1e-3, False)])
def test_a_weight_that_vanishes_in_float16_scales_is_told(copy, tmp_path, method, factor, is_told):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors[LINEAR] = tensors[LINEAR].float() * factor
    save_file(tensors, path, {"format": "pt"})
    events: list[Any] = []
    pipeline.quantize(Location(copy), tmp_path / "out", recipe(method), emit=events.append)
    told = [one for one in warnings_in(events) if "up_proj: the largest weight is" in one]
    assert len(told) == is_told


def test_events_count_every_layer_once(llama, tmp_path):
    events: list[Any] = []
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(), emit=events.append)
    layers = steps_in(events, "quantize")
    assert [layer.done for layer in layers] == list(range(1, 15))
    assert {layer.total for layer in layers} == {14}
    pattern = re.compile(r"model\.layers\S+  error (\S+)  memory [\d.]+ [MG]B")
    for layer in layers:
        found = pattern.fullmatch(layer.detail)
        assert found is not None
        assert 0 < float(found[1]) < 0.1


def test_copied_tensor_that_is_not_finite_is_warned_of_once_and_named(copy, tmp_path):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][2, 3:5] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    events: list[Any] = []
    pipeline.quantize(Location(copy), tmp_path / "out", recipe(), emit=events.append)
    warnings = [message for message in warnings_in(events) if "NaN" in message]
    assert len(warnings) == 1
    assert warnings[0].startswith("lm_head.weight: 2 of 6144 values are NaN or infinite")


def test_a_weight_that_has_to_make_up_for_a_huge_layer_before_it_is_told(copy, text_file, tmp_path):
    path, huge = copy / "model.safetensors", "model.layers.0.self_attn.o_proj"
    tensors = load_file(path)
    tensors[f"{huge}.weight"] = tensors[f"{huge}.weight"].float() * 1e9
    save_file(tensors, path, {"format": "pt"})
    wanted = {
        "calibration": {"dataset": str(text_file), "num_samples": 6, "sequence_length": 64},
        "weights": {
            "method": "gptq",
            "scheme": {"num_bits": 3, "group_size": 32},
            "overrides": [{"match": huge, "skip": True}],
        },
    }
    said = r"proj: scales doesn't fit .* 0\.\d+, and what was solved makes up for errors"
    with pytest.raises(MethodError, match=said + ".*Set calibration.input_error to 0"):
        pipeline.quantize(Location(copy), tmp_path / "out", recipe_from_mapping(wanted))
    pipeline.quantize(
        Location(copy),
        tmp_path / "out",
        recipe_from_mapping(wanted, ["calibration.input_error=0"]),
        overwrite=True,
    )
