"""Measuring two models: nothing that was measured is lost, and never two models at once."""

import json
import math
import shutil
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import pipeline
from qtool.errors import CheckpointError, DataError, ModelError
from qtool.modeling import load as load_module
from qtool.modeling.locate import Location
from qtool.pipeline.model_figures import figures_of
from tests import families
from tests.helpers import warnings_in

# In the package both names are those of functions.
evaluating, timing = (sys.modules[f"qtool.pipeline.{name}"] for name in ("evaluate", "bench"))


def options(text_file, **changes):
    return pipeline.EvalOptions(dataset=str(text_file), context_length=40, max_windows=2, **changes)


def changed(model, target, **values):
    """Return a copy of a model with other values in its configuration."""
    shutil.copytree(model, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def with_weights(model, target, change):
    """Return a copy of a model whose tensors went through a function."""
    shutil.copytree(model, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return target


@pytest.fixture
def only_one_at_a_time(monkeypatch):
    """Fail if a model is loaded while another one lives."""
    alive: list[weakref.ref[Any]] = []
    load = load_module.load_model

    def checked(model, **settings):
        assert not [ref for ref in alive if ref() is not None]
        loaded = load(model, **settings)
        alive.append(weakref.ref(loaded.model))
        return loaded

    for module in (evaluating, timing):
        monkeypatch.setattr(module, "load_model", checked)
    return alive


@pytest.mark.usefixtures("only_one_at_a_time")
def test_other_vocabulary_costs_the_comparison_and_no_perplexity(llama, tmp_path, text_file):
    larger = tmp_path / "larger"
    families.build("llama", vocab_size=128).save_pretrained(larger)
    families.save_tokenizer(larger)
    events: list[Any] = []
    result = pipeline.evaluate(
        Location(llama),
        options(text_file),
        baseline=Location(larger),
        emit=events.append,
    )
    assert result.closeness.text is None
    assert [f.perplexity is not None for f in result.figures] == [True, True]
    (message,) = warnings_in(events)
    assert "aren't compared token by token" in message
    assert "vocabulary of 96" in message


def test_texts_can_be_left_out(llama, text_file):
    result = pipeline.evaluate(
        Location(llama), options(text_file, texts=False), baseline=Location(llama)
    )
    assert result.closeness.text is not None
    assert result.closeness.text.greedy == ()
    assert result.closeness.text.greedy_equal_share is None


def test_bench_frees_the_first_model_before_it_loads_the_second(
    llama, checkpoint, only_one_at_a_time, monkeypatch
):
    monkeypatch.setattr(timing, "time_model", lambda _loaded: None)
    result = pipeline.bench(Location(checkpoint), baseline=Location(llama))
    assert len(only_one_at_a_time) == len(result.figures) == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"no tensor is called \.qweight"),
        ({"quant_method": "awq"}, r"no tensor is called \.qweight"),
        ({"quant_method": "aqlm"}, "quantized by another tool"),
        ({"bits": 4}, "quantized by another tool"),
        ("gptq", "quantization_config is gptq; it must be an object"),
        ([1], r"quantization_config is \[1\]; it must be an object"),
    ],
)
def test_model_of_another_quantizer_is_refused_before_anything_is_measured(
    llama, checkpoint, tmp_path, text_file, monkeypatch, config, words
):
    for module in (evaluating, timing):
        monkeypatch.setattr(module, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    foreign = Location(changed(llama, tmp_path / "foreign", quantization_config=config))
    for model, baseline in ((foreign, None), (Location(llama), foreign)):
        with pytest.raises((ModelError, CheckpointError), match=words):
            pipeline.evaluate(model, options(text_file), baseline=baseline)
    with pytest.raises((ModelError, CheckpointError), match=words):
        pipeline.bench(Location(checkpoint), baseline=foreign)


@pytest.mark.parametrize("config", [None, {}])
def test_empty_quantization_config_is_none(llama, tmp_path, config):
    plain = changed(llama, tmp_path / "plain", quantization_config=config)
    found, expected = figures_of(Location(plain)), figures_of(Location(llama))
    assert found == replace(expected, name=found.name)


def test_bits_are_the_average_over_all_weights(llama, tmp_path):
    def change(tensors):
        half = {name: tensor.half() for name, tensor in tensors.items()}
        return {**half, "model.norm.weight": half["model.norm.weight"].float()}

    mixed = with_weights(llama, tmp_path / "mixed", change)
    tensors = load_file(mixed / "model.safetensors").values()
    weights = sum(tensor.numel() for tensor in tensors)
    stored = 8 * sum(tensor.nbytes for tensor in tensors)
    found = figures_of(Location(mixed)).average_bits
    assert found == pytest.approx(stored / weights)
    assert 16 < found < 16.1


def test_loss_beyond_every_number_is_infinite(llama, tmp_path, text_file):
    def change(tensors):
        return {**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1e5}

    loud = with_weights(llama, tmp_path / "loud", change)
    (figures,) = pipeline.evaluate(Location(loud), options(text_file)).figures
    assert figures.perplexity is not None
    assert figures.perplexity.perplexity == math.inf


def test_outputs_that_are_no_numbers_are_said_and_cost_nothing_else(llama, tmp_path, text_file):
    def change(tensors):
        return {**tensors, "lm_head.weight": torch.full_like(tensors["lm_head.weight"], math.nan)}

    broken = with_weights(llama, tmp_path / "broken", change)
    for model, baseline in ((broken, llama), (llama, broken)):
        events: list[Any] = []
        result = pipeline.evaluate(
            Location(model), options(text_file), baseline=Location(baseline), emit=events.append
        )
        values = [f.perplexity.perplexity for f in result.figures if f.perplexity is not None]
        assert [math.isnan(value) for value in values] == [baseline is broken, model is broken]
        assert result.closeness.text is None
        assert sum("has no perplexity" in message for message in warnings_in(events)) == 1


def test_token_without_an_embedding_is_one_sentence(tmp_path, text_file):
    small = tmp_path / "small"
    families.build("llama", vocab_size=64).save_pretrained(small)
    families.save_tokenizer(small)
    with pytest.raises(DataError, match=r"words\.txt has token \d+, .*embedding 64 rows"):
        pipeline.evaluate(Location(small), options(text_file))
