"""`calibration.mixture` in a recipe: shares, what excludes what, what is written down."""

import pytest

from qtool.errors import RecipeError
from qtool.recipe.load import load_recipe, recipe_from_mapping
from qtool.recipe.names import built_in

SOURCES = [{"dataset": "a.txt", "share": 0.4, "as": "text"}, {"dataset": "b.jsonl", "share": 0.6}]


def calibration(*overrides, **values):
    sections = {"weights": {"method": "rtn"}, "calibration": values}
    return recipe_from_mapping(sections, overrides).calibration


def names(*overrides, **values):
    return [source.dataset for source in calibration(*overrides, **values).sources]


def test_default_is_the_bundled_mixture_and_is_written_down():
    section = calibration()
    assert section.sources[0].dataset == "wikitext2-valid"
    assert sum(source.share for source in section.mixture) == pytest.approx(1, abs=1e-9)
    dumped = section.model_dump(mode="json")
    assert "dataset" not in dumped
    assert calibration(**dumped) == section


def test_calibrated_recipes_take_the_bundled_mixture():
    sections = [load_recipe(name).calibration for name in built_in()]
    assert {len(section.mixture) for section in sections if section is not None} == {6}


def test_dataset_alone_is_one_source_and_nothing_else_is_written_down():
    section = calibration(dataset="a.txt")
    assert ([one.dataset for one in section.sources], section.mixture) == (["a.txt"], ())
    dumped = section.model_dump(mode="json")
    assert dumped["dataset"] == "a.txt"
    assert "mixture" not in dumped
    assert calibration(**dumped) == section


def test_mixture_is_read_and_written_as_it_is_given():
    section = calibration(mixture=SOURCES)
    assert [source.rendering for source in section.mixture] == ["text", None]
    assert section.model_dump(mode="json")["mixture"] == SOURCES
    assert calibration(**section.model_dump(mode="json")) == section


@pytest.mark.parametrize("off", [0.0, 9e-7, -9e-7])
def test_shares_may_be_off_by_rounding(off):
    calibration(mixture=[{"dataset": "a", "share": 0.5}, {"dataset": "b", "share": 0.5 + off}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mixture": [{"dataset": "a", "share": 0.5}, {"dataset": "b", "share": 0.4}]},
            r"calibration\.mixture is .*; the shares must add up to 1, and add up to 0\.9",
        ),
        (
            {"mixture": [{"dataset": "a", "share": 0.5}, {"dataset": "b", "share": 0.500002}]},
            r"add up to 1, and add up to 1\.000002",
        ),
        ({"mixture": SOURCES, "dataset": "a.txt"}, "dataset and mixture both say .* to null"),
        ({"mixture": []}, "mixture is empty; name its sources"),
        ({"mixture": "a.txt"}, r"calibration\.mixture is 'a\.txt'"),
        ({"mixture": [{"dataset": "a", "share": 0}]}, r"mixture\.0\.share is 0; it should be"),
        ({"mixture": [{"dataset": "a", "share": True}]}, r"mixture\.0\.share is True"),
        ({"mixture": [{"dataset": "a"}]}, r"mixture\.0\.share is missing"),
        ({"mixture": [{"share": 1}]}, r"mixture\.0\.dataset is missing"),
        (
            {"mixture": [{"dataset": "a", "share": 1, "as": "words"}]},
            r"mixture\.0\.as is 'words'; it should be 'text' or 'chat'",
        ),
        (
            {"mixture": [{"dataset": "a", "shares": 1}]},
            r"No 'shares' in calibration\.mixture\.0\. Did you mean 'share'\?",
        ),
        ({"mixture": [{"dataset": "a", "share": 1, "az": "text"}]}, "Known: dataset, share, as"),
    ],
)
def test_impossible_mixture_is_one_sentence(values, message):
    with pytest.raises(RecipeError, match=message) as caught:
        calibration(**values)
    assert "\n" not in str(caught.value)


def test_command_line_changes_either():
    assert names("calibration.dataset=a.txt") == ["a.txt"]
    one = "calibration.mixture=[{dataset: a.txt, share: 1}]"
    assert names(one) == ["a.txt"]
    both = ("calibration.mixture=null", "calibration.dataset=c.txt")
    assert names(*both, mixture=SOURCES) == ["c.txt"]
    shares = ("calibration.mixture.0.share=0.5", "calibration.mixture.1.share=0.5")
    assert [source.share for source in calibration(*shares, mixture=SOURCES).mixture] == [0.5, 0.5]
    with pytest.raises(RecipeError, match="both say where"):
        calibration("calibration.dataset=c.txt", mixture=SOURCES)
