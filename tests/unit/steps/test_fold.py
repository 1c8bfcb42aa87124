"""Folds through whole runs: the same function, resumed, restricted, beside other sections."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.base import Progress
from qtool.checkpoint.reader import CheckpointReader
from qtool.data.calibration import CalibrationSet
from qtool.errors import ModelError, RecipeError, UnknownNameError
from qtool.folds import fold_names
from qtool.modeling.families import families as known_families
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.steps import fold as step
from tests.helpers import dequantized, file_hashes, recipe, steps_in

PROMPT = torch.arange(3, 23).unsqueeze(0)
FEW = {"exponents": 3}


def folding(dataset, name="aqas", *, num_bits=8, method="rtn", keys=None, **sections: Any):
    options = {} if name == "smoothquant" else FEW
    return recipe(
        method,
        num_bits,
        calibration={"dataset": str(dataset), "num_samples": 8, "sequence_length": 32},
        fold={"name": name, "options": options, **(keys or {})},
        **sections,
    )


@torch.inference_mode()
def logits(directory: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(PROMPT, use_cache=False).logits


def stored(reader: CheckpointReader, name: str) -> Any:
    """Return a tensor of a checkpoint, or a quantized one."""
    return reader.load(name)


def distance(model: Path, out_dir: Path) -> float:
    expected = logits(model)
    return float((logits(out_dir) - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", known_families())
def test_every_family_folded_with_eight_bits_is_close_to_the_original(
    family, tiny, text_file, tmp_path
):
    model = tiny(family)
    tokens = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    samples, chosen = CalibrationSet(tuple(tokens), {}), folding(text_file, "smoothquant")
    pipeline.quantize(Location(model), tmp_path / "out", chosen, samples=samples)
    assert distance(model, tmp_path / "out") < 0.02
    reader, source = CheckpointReader(tmp_path / "out"), open_source(Location(model))
    changed = [name for name in reader.names() if source.has(name)]
    assert any(not torch.equal(stored(reader, name), source.read(name)) for name in changed)
    for name in changed:
        assert stored(reader, name).dtype == source.read(name).dtype


@pytest.mark.parametrize("name", fold_names())
def test_every_fold_and_solver_with_data(name, llama, text_file, tmp_path):
    chosen = folding(text_file, name, method="gptq")
    events: list[Any] = []
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, emit=events.append)
    assert distance(llama, tmp_path / "out") < 0.02
    told = steps_in(events, "folding")
    assert [event.done for event in told] == [1, 2]
    assert re.fullmatch(r"model\.layers\.1  \d+% of the error is left", told[1].detail)
    assert CheckpointReader(tmp_path / "out").manifest.recipe["fold"]["name"] == name


@pytest.mark.parametrize("finished", [1, 2])
def test_resumed_run_gives_the_same_bytes_and_searches_no_block_again(
    llama, text_file, tmp_path, monkeypatch, finished
):
    chosen = folding(text_file)
    pipeline.quantize(Location(llama), tmp_path / "whole", chosen)

    def stop(event):
        if isinstance(event, Progress) and event.what == "folding" and event.done == finished + 1:
            raise KeyboardInterrupt
        if isinstance(event, Progress) and event.what == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(Location(llama), tmp_path / "out", chosen, emit=stop)
    searched: list[str] = []
    make = step._problem

    def noted(run, layers, group, seen):
        searched.append(layers[0].name)
        return make(run, layers, group, seen)

    monkeypatch.setattr(step, "_problem", noted)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    assert {name.split(".")[2] for name in searched} == ({"1"} if finished == 1 else set())
    for name in ("model.safetensors", "config.json"):
        assert file_hashes(tmp_path / "out")[name] == file_hashes(tmp_path / "whole")[name]


def test_only_named_groups_are_folded(llama, text_file, tmp_path):
    chosen = folding(text_file, keys={"groups": ["mlp.up_proj"]})
    pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    reader, source = CheckpointReader(tmp_path / "out"), open_source(Location(llama))
    unlike = [
        name
        for name in reader.names()
        if source.has(name) and not torch.equal(stored(reader, name), source.read(name))
    ]
    assert unlike == [f"model.layers.{block}.post_attention_layernorm.weight" for block in (0, 1)]


def test_linears_that_stay_in_16_bits_are_folded_all_the_same(llama, text_file, tmp_path):
    skip = [{"match": "*.v_proj", "skip": True}, {"match": "*.1.mlp.*", "skip": True}]
    chosen = folding(text_file, "smoothquant")
    weights = {**chosen.weights.model_dump(), "overrides": skip}
    chosen = chosen.model_copy(update={"weights": chosen.weights.model_validate(weights)})
    pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    assert distance(llama, tmp_path / "out") < 0.02
    reader, source = CheckpointReader(tmp_path / "out"), open_source(Location(llama))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert stored(reader, name).dtype == torch.float16
    assert not torch.equal(stored(reader, name), source.read(name))
    untouched = "model.layers.1.mlp.down_proj.weight"  # nothing behind that norm is quantized
    assert torch.equal(stored(reader, untouched), source.read(untouched))


@pytest.mark.parametrize(
    "tuning", [{"blocks": {"steps": 2}}, {"end_to_end": {"steps": 2, "sequence_length": 16}}]
)
def test_what_is_tuned_is_the_folded_model(tuning, llama, text_file, tmp_path):
    chosen = folding(text_file, "smoothquant", tuning=tuning)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    assert distance(llama, tmp_path / "out") < 0.02


def test_bits_are_chosen_for_the_folded_model(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    budget = {"average_bits": 5.0, "choices": [3, 8], "tokens": 128}
    chosen = folding(text_file, "smoothquant", choosing=budget)
    found = pipeline.explain(Location(llama), chosen)
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    assert found is not None
    assert result.choosing["layers"] == found.summary()["layers"]
    plain = pipeline.explain(Location(llama), chosen.model_copy(update={"fold": None}))
    assert plain is not None
    assert plain.divergence != found.divergence


def test_weights_in_the_checkpoint_are_those_of_the_folded_source(llama, text_file, tmp_path):
    chosen = folding(text_file, "smoothquant", num_bits=8)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    reader, source = CheckpointReader(tmp_path / "out"), open_source(Location(llama))
    norm, linear = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"
    factors = source.read(norm).float() / stored(reader, norm).float()
    expected = source.read_weight(linear) * factors
    error = (dequantized(stored(reader, linear)) - expected).norm() / expected.norm()
    assert float(error) < 0.01


@pytest.mark.parametrize("rule", [None, "max", "percentile", "mse"])
def test_activations_are_quantized_as_the_search_has_it(rule, llama, text_file, tmp_path):
    """On tokens that weren't seen; with few samples a static range fits those alone."""
    inputs = {} if rule is None else {"granularity": "tensor", "range": rule}
    tokens = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(0))
    samples, chosen = CalibrationSet(tuple(tokens), {}), folding(text_file, activations=inputs)
    for name, one in (("out", chosen), ("plain", chosen.model_copy(update={"fold": None}))):
        pipeline.quantize(Location(llama), tmp_path / name, one, samples=samples)
    folded, unfolded = (distance(llama, tmp_path / name) for name in ("out", "plain"))
    assert folded < 1.2 * unfolded
    entries = CheckpointReader(tmp_path / "out").manifest.layers.values()
    schemes = [entry.activation for entry in entries if entry.activation is not None]
    assert len(schemes) == 14
    assert {scheme.scale is None for scheme in schemes} == {rule is None}


def test_a_recipe_without_a_fold_says_nothing_of_it():
    assert "fold" not in recipe().model_dump(mode="json")


def test_another_fold_drops_the_options_of_the_old_one():
    values = {
        "weights": {"method": "rtn"},
        "calibration": {},
        "fold": {"name": "smoothquant", "options": {"alpha": 0.3}},
    }
    fold = recipe_from_mapping(values, ["fold.options.exponents=4", "fold.name=awq"]).fold
    assert fold is not None
    assert fold.options == {"exponents": 4}


def test_what_is_wrong_is_found_before_anything_is_read(tiny, text_file):
    def plan(family="llama", **keys):
        return pipeline.plan(Location(tiny(family)), folding(text_file, keys=keys))

    assert plan().layers
    with pytest.raises(UnknownNameError, match=r"No 'aqs' in folds\. Did you mean 'aqas'\?"):
        plan(name="aqs")
    with pytest.raises(UnknownNameError, match=r"No 'mlp\.up' in fold\.groups\."):
        plan(groups=["mlp.up"])
    with pytest.raises(RecipeError, match=r"fold\.options\.exponents is 0"):
        plan(options={"exponents": 0})
    with pytest.raises(ModelError, match="nobody has said what makes its inputs in a 'bloom'"):
        plan("bloom")
    with pytest.raises(ModelError, match=r"mlp\.c_proj: its inputs come from .* through gelu_new"):
        plan("gpt2", groups=["mlp.c_proj"])
    without = folding(text_file).model_copy(update={"calibration": None})
    with pytest.raises(RecipeError, match="fold needs calibration data"):
        pipeline.plan(Location(tiny("llama")), without)
