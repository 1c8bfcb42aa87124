"""Every shipped recipe is a test: it loads, plans on a tiny model, and says what it does."""

import re

import pytest
import yaml

import qtool.training.recipes
from qtool import pipeline, plugins, resources
from qtool.folds import fold_names
from qtool.modeling.locate import Location
from qtool.recipe.load import load_recipe
from qtool.recipe.names import built_in, in_folders
from qtool.steps.options import read_options
from qtool.training.recipes import load_training

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


@pytest.mark.parametrize("name", [*built_in(), *in_folders()])
def test_recipe_plans_on_a_tiny_model(name, tiny):
    recipe = load_recipe(name)
    plan = pipeline.plan(Location(tiny("llama", tied=recipe.head is None)), recipe)
    assert plan.layers
    assert 1 <= plan.average_bits < 16
    assert plan.total_bytes < plan.source_bytes


ACTIVATIONS = re.compile(r"w(\d)a(\d)-(\w+?)(-static)?")


@pytest.mark.parametrize("name", [*filter(ACTIVATIONS.fullmatch, built_in())])
def test_name_tells_widths_of_weights_and_activations_and_the_fold(name):
    found, recipe = ACTIVATIONS.fullmatch(name), load_recipe(name)
    assert found is not None
    assert recipe.activations is not None
    assert recipe.weights.scheme.num_bits == int(found[1])
    assert recipe.activations.num_bits == int(found[2])
    assert recipe.activations.granularity == ("tensor" if found[4] else "token")
    if found[3] in fold_names():
        assert recipe.fold is not None
        assert recipe.fold.name == found[3]


@pytest.mark.parametrize("name", [name for name in built_in() if name.startswith("train-")])
def test_name_tells_width_and_how_it_is_trained(name):
    _, width, trained = name.split("-", 2)
    recipe = load_recipe(name)
    assert recipe.training is not None
    assert recipe.training.name == trained
    own = read_options(trained, load_training(trained).options, recipe.training.options, "options")
    bits = recipe.weights.scheme.num_bits
    if trained == "flexor":
        bits = own.planes * own.inputs / own.outputs
    assert bits == float(width.removeprefix("w"))
    assert recipe.training.name in plugins.command_names(qtool.training.recipes)


@pytest.mark.parametrize("name", [name for name in built_in() if name.startswith("sparse-")])
def test_name_tells_the_zeros_of_a_sparse_weight(name):
    _, zeros, _ = name.split("-")
    weights = load_recipe(name).weights
    assert weights.method == "sparse_bcq"
    assert weights.options["sparsity"] == int(zeros) / 100


@pytest.mark.parametrize(
    "name", [name for name in built_in() if not name.startswith(("w", "train", "sparse"))]
)
def test_name_tells_method_width_and_group(name):
    method, _, scheme = name.partition("-w")
    weights = load_recipe(name).weights
    assert weights.method == method.split("-")[0]
    width, _, group = scheme.partition("g")
    assert weights.scheme.num_bits == int(width)
    assert weights.scheme.group_size == int(group.split("-")[0])
