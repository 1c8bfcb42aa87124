import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.errors import ModelError, QtoolError, RecipeError, SchemeError, UnknownNameError
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.steps.plan import make_plan
from qtool.steps.request import with_samples
from tests.helpers import recipe, warnings_in

RTN4 = {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}


@pytest.fixture(scope="module")
def source(llama):
    return open_source(Location(llama))


def plan_of(source, *overrides, **sections):
    weights = {**RTN4, "overrides": list(overrides)}
    return make_plan(source, recipe_from_mapping({"weights": weights, **sections}))


def widths(plan):
    return {layer.name: layer.scheme.num_bits for layer in plan.layers}


@pytest.mark.parametrize("taken", ["q_proj.scales", "q_proj"])
def test_tensor_named_like_what_is_written_is_refused(llama, tmp_path, taken):
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.0.self_attn.{taken}"] = torch.ones(3)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"a tensor is named .*{taken}, as quantizing names"):
        plan_of(open_source(Location(model)))


def test_overrides_change_only_what_they_match(source):
    plan = plan_of(source, {"match": "*.down_proj", "scheme": {"num_bits": 6}})
    for name, bits in widths(plan).items():
        assert bits == (6 if name.endswith("down_proj") else 4)
    assert {layer.scheme.group_size for layer in plan.layers} == {32}


GPTQ_OR_DINT = {"method": "gptq", "choose": {"method": ["gptq", "dint"]}}


def test_plan_of_a_choice_of_methods_counts_the_one_that_takes_most(source):
    values = {"method": "gptq", "scheme": {"num_bits": 4, "group_size": 32}}
    values["options"] = {"polish_rounds": 0}
    sizes = []
    for others in (["dint"], ["bcq"], ["dint", "bcq"]):
        weights = {**values, "choose": {"method": ["gptq", *others]}}
        plan = make_plan(source, recipe_from_mapping({"calibration": {}, "weights": weights}))
        sizes.append(plan.total_bytes)
        for layer in plan.layers:
            assert [name for name, _ in layer.methods] == ["gptq", *others]
            assert all(options.polish_rounds == 0 for _, options in layer.methods)
    alone = make_plan(source, recipe_from_mapping({"calibration": {}, "weights": values}))
    assert alone.total_bytes == sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choose": {"method": ["dint", "gptq"]}}, r"should begin with weights\.method, .* 'gptq'"),
        ({"choose": {"method": ["gptq", "dint", "dint"]}}, "name each method once"),
        ({"choose": {"method": ["gptq", "dibt"]}}, "dibt"),
        ({"scheme": {"num_bits": 2}}, "num_bits is 2; 'dint' takes 3 to 8"),
        ({"options": {"rounds": 3}}, "No 'rounds' in weights.options of 'gptq'"),
    ],
)
def test_choice_of_methods_that_is_wrong_is_refused(source, changes, message):
    recipe = recipe_from_mapping({"calibration": {}, "weights": {**GPTQ_OR_DINT, **changes}})
    with pytest.raises(QtoolError, match=message):
        make_plan(source, recipe)


def test_choice_of_methods_needs_data_and_no_tuning(source):
    weights = {**GPTQ_OR_DINT, "method": "rtn", "choose": {"method": ["rtn", "dint"]}}
    with pytest.raises(RecipeError, match="choose needs calibration data"):
        make_plan(source, recipe_from_mapping({"weights": weights}))
    assert with_samples(recipe_from_mapping({"weights": weights})).calibration is not None
    tuned = {"calibration": {}, "weights": GPTQ_OR_DINT, "tuning": {"blocks": {}}}
    with pytest.raises(RecipeError, match="weights of 'dint' can't be tuned"):
        make_plan(source, recipe_from_mapping(tuned))


def test_override_can_unset_the_group_size(source):
    plan = plan_of(source, {"match": "*.0.*", "scheme": {"group_size": None}})
    sizes = {layer.name.split(".")[2]: layer.scheme.group_size for layer in plan.layers}
    assert sizes == {"0": None, "1": 32}


def test_first_matching_override_wins(source):
    plan = plan_of(
        source,
        {"match": "model.layers.0.*", "scheme": {"num_bits": 8}},
        {"match": "*.q_proj", "scheme": {"num_bits": 2}},
    )
    assert widths(plan)["model.layers.0.self_attn.q_proj"] == 8
    assert widths(plan)["model.layers.1.self_attn.q_proj"] == 2


def test_skipped_layers_are_kept_as_they_are(source):
    plan = plan_of(source, {"match": "*.mlp.*", "skip": True})
    assert len(plan.layers) == 8
    assert "model.layers.0.mlp.up_proj.weight" in plan.kept


def test_other_method_starts_from_its_own_options(source):
    weights = {
        **RTN4,
        "options": {"clip_ratio": 0.9},
        "overrides": [
            {"match": "*.q_proj", "method": "bcq", "options": {"rounds": 2}},
            {"match": "*.k_proj", "options": {"clip_ratio": 0.5}},
        ],
    }
    plan = make_plan(source, recipe_from_mapping({"weights": weights}))
    by_name = {layer.name.rsplit(".", 1)[-1]: layer for layer in plan.layers}
    assert (by_name["q_proj"].method, by_name["q_proj"].options.rounds) == ("bcq", 2)
    assert (by_name["k_proj"].method, by_name["k_proj"].options.clip_ratio) == ("rtn", 0.5)
    assert by_name["v_proj"].options.clip_ratio == 0.9


@pytest.mark.parametrize("match", ["*.nothing", "q_proj", "MODEL.*", ""])
def test_override_that_matches_nothing_is_an_error(source, match):
    with pytest.raises(RecipeError, match="which matches none of the 14 layers; the first is"):
        plan_of(source, {"match": match, "skip": True})


def test_skipping_everything_is_an_error(source):
    with pytest.raises(RecipeError, match="nothing is left to quantize"):
        plan_of(source, {"match": "*", "skip": True})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"scheme": {"num_bits": 9}}, "num_bits"),
        ({"scheme": {"num_bits": 0}}, "num_bits"),
        ({"scheme": {"group_size": -1}}, "group_size"),
        ({"scheme": {"num_bitz": 3}}, "Did you mean 'num_bits'"),
        ({"scheme": {"group_dim": "rows"}}, "group_dim"),
        ({"options": {"clip_ration": 1}}, "Did you mean 'clip_ratio'"),
        ({"options": {"clip_ratio": 2.0}}, "clip_ratio is 2.0"),
        ({"method": "rtm"}, "Did you mean 'rtn'"),
    ],
)
def test_impossible_override_is_one_sentence(source, override, message):
    with pytest.raises(QtoolError, match=message) as caught:
        plan_of(source, {"match": "*.q_proj", **override})
    assert "\n" not in str(caught.value)


def test_unknown_method_suggests_the_nearest(source):
    with pytest.raises(UnknownNameError, match=r"No 'rtnn' in methods\. Did you mean 'rtn'\?"):
        make_plan(source, recipe_from_mapping({"weights": {"method": "rtnn"}}))


def test_scheme_that_a_method_cannot_do_is_refused_before_reading(source):
    scheme = {"num_bits": 1, "symmetric": True}
    with pytest.raises(SchemeError, match="Use 'bcq' for 1 bit"):
        make_plan(source, recipe_from_mapping({"weights": {"method": "rtn", "scheme": scheme}}))


def test_head_section_of_a_tied_model_is_refused_with_the_way_out(tiny):
    source = open_source(Location(tiny("llama", tied=True)))
    with pytest.raises(RecipeError, match="tied to its embedding; quantize both with the section"):
        plan_of(source, head={})


def test_embedding_of_a_tied_model_covers_the_head(tiny):
    plan = plan_of(open_source(Location(tiny("llama", tied=True))), embedding={})
    assert plan.tied_head == "lm_head"
    assert [layer.role for layer in plan.layers].count("embedding") == 1
    assert "lm_head" not in {layer.name for layer in plan.layers}


def test_planned_sizes_are_those_that_are_written(llama, tmp_path):
    chosen = recipe("bcq", 3, 24, embedding={"method": "rtn"})
    plan = pipeline.plan(Location(llama), chosen)
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == 8 + header + plan.total_bytes
    assert result.weight_bytes == plan.total_bytes
    assert result.average_bits == plan.average_bits


def test_average_bits_count_scales_and_zero_points(source):
    layer = plan_of(source).layers[0]
    assert layer.average_bits == pytest.approx(4 + (16 + 4) / 32)


def test_planning_reads_no_weights(llama, monkeypatch):
    from qtool.checkpoint.shards import Shards

    monkeypatch.setattr(Shards, "read", lambda *_args: pytest.fail("read a weight"))
    assert len(pipeline.plan(Location(llama), recipe()).layers) == 14


def test_method_that_needs_data_is_refused_wherever_there_is_none(source):
    with pytest.raises(RecipeError, match=r"q_proj: 'gptq' needs calibration data"):
        plan_of(source, {"match": "*q_proj", "method": "gptq"})
    table = {"method": "gptq", "scheme": {"num_bits": 4}}
    for data in (None, {"num_samples": 4}):
        with pytest.raises(RecipeError, match=r"embed_tokens: .* Use 'rtn' or 'bcq'"):
            plan_of(source, embedding=table, calibration=data)


def test_samples_are_drawn_if_any_layer_does_better_with_them():
    plain = {"method": "rtn"}
    mixed = {**plain, "overrides": [{"match": "*", "method": "gptq"}]}
    for weights, wanted in ((plain, False), (mixed, True), ({"method": "bcq"}, True)):
        chosen = with_samples(recipe_from_mapping({"weights": weights}))
        assert (chosen.calibration is not None) == wanted


@pytest.mark.parametrize(("second", "is_told"), [("*.o_proj", True), ("*.up_proj", False)])
def test_an_override_that_decides_nothing_is_told(llama, tmp_path, second, is_told):
    overrides = [
        {"match": "*.self_attn.*", "scheme": {"num_bits": 8}},
        {"match": second, "scheme": {"num_bits": 3}},
    ]
    scheme = {"num_bits": 4, "group_size": 32}
    chosen = {"weights": {"method": "rtn", "scheme": scheme, "overrides": overrides}}
    events: list[Any] = []
    pipeline.quantize(
        Location(llama), tmp_path / "out", recipe_from_mapping(chosen), emit=events.append
    )
    told = [one for one in warnings_in(events) if "overrides.1 (*.o_proj) does nothing" in one]
    assert len(told) == is_told
