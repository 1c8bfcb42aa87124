"""Every shipped recipe is a test: it loads, plans on a tiny model, and says what it does."""

import pytest
import yaml

from qtool import pipeline, resources
from qtool.modeling.locate import Location
from qtool.recipe.load import load_recipe
from qtool.recipe.names import built_in

FILES = sorted(resources.recipes_dir().rglob("*.yaml"))


def test_there_are_recipes_and_each_top_level_file_is_built_in():
    names = {path.stem for path in FILES if path.parent == resources.recipes_dir()}
    assert names == set(built_in())
    assert names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_a_mapping_with_a_version_and_a_description(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values["version"] == 1
    assert values["description"].endswith(".")
    assert "\n" not in values["description"]


@pytest.mark.parametrize("name", built_in())
def test_recipe_plans_on_a_tiny_model(name, tiny):
    recipe = load_recipe(name)
    plan = pipeline.plan(Location(tiny("llama", tied=recipe.head is None)), recipe)
    assert plan.layers
    assert 1 <= plan.average_bits < 16
    assert plan.total_bytes < plan.source_bytes


@pytest.mark.parametrize("name", built_in())
def test_name_tells_method_width_and_group(name):
    weights = load_recipe(name).weights
    if name.startswith("w"):  # named for what is special, such as w3-q-rater
        assert name.startswith(f"w{weights.scheme.num_bits}")
        return
    method, _, scheme = name.partition("-w")
    assert weights.method == method.split("-")[0]
    width, _, group = scheme.partition("g")
    assert weights.scheme.num_bits == int(width)
    assert weights.scheme.group_size == int(group.split("-")[0])
