"""docs/which-recipe.md: what its script foretells is what a checkpoint takes."""

import importlib
import sys

import pytest

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.modeling.config import parse_config
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.pipeline.inspect import memory_of
from qtool.recipe.load import load_recipe
from qtool.runtime.card_memory import card_memory
from qtool.steps.plan import make_plan
from tests.helpers import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    yield importlib.import_module("which_recipe")
    sys.modules.pop("which_recipe")


def test_only_recipes_that_exist_are_named_and_the_closest_comes_first(script):
    bits = [load_recipe(name).weights.scheme.num_bits for name in script.RECIPES]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["bcq-w2g32-coded", "rtn-w4g128"])
def test_memory_of_a_plan_is_that_of_its_checkpoint(script, tiny, tmp_path, tied, name):
    model, recipe = Location(tiny("llama", tied=tied)), load_recipe(name, ["calibration=null"])
    pipeline.quantize(model, tmp_path / "out", recipe)
    reader, source = CheckpointReader(tmp_path / "out"), open_source(model)
    plan = make_plan(source, recipe)
    assert {entry.format for entry in reader.manifest.layers.values()} == {
        script.entry_of(layer).format for layer in plan.layers
    }
    config = parse_config(reader.config, reader.directory)
    assert card_memory(script.headers(source, plan), config) == memory_of(reader)
