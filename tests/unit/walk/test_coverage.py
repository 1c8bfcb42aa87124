"""What a plan refuses about a model, and what is to blame for inputs that are not finite."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.errors import ModelError, QtoolError, RecipeError
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.steps.plan import make_plan
from qtool.walk.statistics import why_not_finite
from tests import families
from tests.helpers import recipe

WEIGHTS = "model.safetensors"
DBRX: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Return a source whose experts are plain parameters of two dimensions."""
    directory = tmp_path_factory.mktemp("dbrx")
    families.build("dbrx", **DBRX).save_pretrained(directory)
    return open_source(Location(directory))


@pytest.fixture
def copy(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_tensors(directory: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, **changes}, directory / WEIGHTS, {"format": "pt"})


def with_overrides(*overrides: dict[str, Any]):
    section = recipe().weights.model_dump() | {"overrides": list(overrides)}
    return recipe().model_validate({**recipe().model_dump(), "weights": section})


def test_experts_that_would_stay_are_named_with_the_way_to_ask_for_it(experts):
    with pytest.raises(
        ModelError,
        match=r"66% .*quantize ffn\.experts\.mlp\.\w+, [^ ]+, [^ ]+: experts that .* "
        r"\(Dbrx\w+\)\. If .*skip: true",
    ) as caught:
        make_plan(experts, recipe())
    assert "\n" not in str(caught.value)


def test_experts_stay_if_the_recipe_says_so(experts):
    plan = make_plan(experts, with_overrides({"match": "*.experts.*", "skip": True}))
    assert sum("experts" in name for name in plan.kept) == 6
    assert not any("experts" in layer.name for layer in plan.layers)


def test_asking_for_some_of_them_is_not_enough(experts):
    with pytest.raises(ModelError, match="would stay as they are"):
        make_plan(experts, with_overrides({"match": "*.experts.mlp.w1", "skip": True}))


def test_experts_cannot_be_quantized_by_an_override(experts):
    with pytest.raises(RecipeError, match="matches none of the"):
        make_plan(experts, with_overrides({"match": "*.experts.*", "scheme": {"num_bits": 8}}))


def test_skipped_linears_are_asked_for(llama):
    plan = pipeline.plan(Location(llama), with_overrides({"match": "*.mlp.*", "skip": True}))
    assert len(plan.layers) == 8


def test_tensor_with_the_name_of_a_part_is_refused(copy):
    edit_tensors(copy, **{"model.layers.0.self_attn.q_proj.scales": torch.ones(3)})
    with pytest.raises(ModelError, match=r"a tensor is named .*q_proj\.scales"):
        pipeline.plan(Location(copy), recipe())


def test_table_with_the_name_of_a_part_is_refused(copy):
    edit_tensors(copy, **{"model.embed_tokens.scales": torch.ones(3)})
    assert pipeline.plan(Location(copy), recipe()).layers
    with pytest.raises(ModelError, match=r"a tensor is named .*embed_tokens\.scales"):
        pipeline.plan(Location(copy), recipe(embedding={}))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_values_of_the_source_are_blamed_before_the_dtype(copy, tmp_path, text_file, name):
    values = load_file(copy / WEIGHTS)[name]
    values.view(-1)[5:] = torch.nan
    edit_tensors(copy, **{name: values})
    source = open_source(Location(copy))
    message = why_not_finite(source, "model.layers.0.x", torch.float16)
    assert f"{values.numel() - 5} of {values.numel()} values of {name} in the model's" in message
    assert "dtype" not in message
    if "embed" in name:
        data = {"dataset": str(text_file), "num_samples": 4, "sequence_length": 16}
        with pytest.raises(QtoolError, match=rf"values of {name}"):
            pipeline.quantize(Location(copy), tmp_path / "o", recipe("gptq", calibration=data))


def test_dtype_is_blamed_if_the_values_are_finite(llama):
    source = open_source(Location(llama))
    narrow = why_not_finite(source, "layer", torch.float16)
    assert "leaves the range of float16" in narrow and "calibration.dtype to float32" in narrow
    assert "calibration.dtype" not in why_not_finite(source, "layer", torch.float32)
