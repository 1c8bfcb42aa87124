"""Globs that a recipe has for layers, those of single experts among them."""

import pytest

from qtool.recipe.matching import matches

EXPERT = "model.layers.1.mlp.experts.down_proj[17]"


@pytest.mark.parametrize(
    "glob",
    [
        EXPERT,
        "*.down_proj[17]",
        "*.down_proj[*]",
        "*.down_proj[1?]",
        "*.down_proj[[0-2]7]",
        "*.down_proj",
        "*.experts.*",
        "model.layers.[01].*.down_proj[17]",
        "model.layers.[01].*",
    ],
)
def test_an_expert_is_matched_by_its_name_its_number_and_what_all_share(glob):
    assert matches(EXPERT, glob)


@pytest.mark.parametrize(
    "glob",
    ["*.down_proj[1]", "*.down_proj[7]", "*.down_proj[2?]", "*.gate_up_proj", "*.layers.[02].*"],
)
def test_others_are_not(glob):
    assert not matches(EXPERT, glob)


def test_brackets_stay_a_choice_of_characters_for_other_layers():
    assert matches("model.layers.1.mlp.w2", "*.w[12]")
    assert not matches("model.layers.1.mlp.w3", "*.w[12]")
    assert not matches("model.layers.1.mlp.down_proj", "*.down_proj[7]")
