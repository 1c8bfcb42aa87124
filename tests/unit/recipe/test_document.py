"""Recipes from strangers: read, or one line, in bounded time."""

import os
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import QtoolError, RecipeError
from qtool.recipe.document import parse_value, read_document
from qtool.recipe.load import load_recipe, recipe_from_mapping

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "more than 10000 values"),
        ("a: [" + "1," * 50_000 + "]", "more than 10000 values"),
        ("a: " + "[" * 3000 + "]" * 3000, "more than 50 deep"),
        ("".join(" " * i + "a:\n" for i in range(300)), "more than 50 deep"),
        ("weights: &a [*a]", "more than 50 deep"),
        ("weights: &a {<<: *a}", "more than 50 deep"),
        ("a: 1" + ":10" * 50_000, "line 1 .*more than 100 characters"),
        ("a: " + "9" * 5000, "line 1 .*more than 100 characters"),
        ("a: 0x" + "f" * 5000, "line 1 .*more than 100 characters"),
        ("x" * 300_000, "more than 262144 bytes"),
        ("seed: !!bool abc", "line 1 .*'abc' is no bool"),
        ("seed: !!int abc", "line 1 .*'abc' is no int"),
        ("seed: !!float abc", "line 1 .*'abc' is no float"),
        ("b: 1\nseed: !!timestamp abc", "line 2 .*timestamp' has no meaning"),
        ("seed: 010", "010 means 8 in YAML; write 8, or quote it"),
        ("a: [1, 1:04]", "1:04 means 64 in YAML"),
        ("a: !!binary abc", "binary' has no meaning"),
        ("a: !!set {b, c}", "set' has no meaning"),
        ("a: !!omap [b: c]", "omap' has no meaning"),
        ("a: !mine [b]", "'!mine' has no meaning"),
        ("a: !!python/object/apply:os.system [ls]", "has no meaning"),
        ("? [a]\n: 1", "line 1 .*a key must be a name"),
        ("a: {<<: 3}", "<< takes a mapping"),
        ("a: *nothing", "line 1 .*undefined alias"),
        ("a: \0", "unacceptable character"),
        ("a:\n\tb: 1", "line 2 isn't valid YAML"),
        ("&a a: 1\n*a : 2", "a is given twice"),
    ],
)
def test_hostile_document_is_one_line_at_once(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError, match=words) as caught:
        read_document(path)
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("\ufeffa: 1\r\nb: x\r\n", {"a": 1, "b": "x"}),
        ("a: 2001-02-30", {"a": "2001-02-30"}),  # no dates: a description may look like one
        ("a: =", {"a": "="}),
        ("1: x\nnull: y", {"1": "x", "null": "y"}),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        (
            "a: &a {x: 1}\nb: &b {x: 2, z: 2}\nc: {<<: [*a, *b]}",
            {"a": {"x": 1}, "b": {"x": 2, "z": 2}, "c": {"x": 1, "z": 2}},
        ),
        ('a: "\\ud83d"', {"a": "\ufffd"}),
        ("a: !!str 3\nb: !!int '4'", {"a": "3", "b": 4}),
    ],
)
def test_document_means_what_it_says(tmp_path, text, values):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8", newline="")
    assert read_document(tmp_path / "r.yaml").values == values


def test_what_is_no_file_is_no_recipe(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "wide.yaml").write_text("weights: {method: rtn}", encoding="utf-16")
    for name in (
        "folder.yaml",
        "pipe.yaml",
        "wide.yaml",
        "no.yaml",
        "x" * 300 + ".yaml",
        "\0.yaml",
    ):
        with pytest.raises(RecipeError):
            load_recipe(str(tmp_path / name))
        (tmp_path / "r.yaml").write_text("\nextends: '" + name.replace("\0", "") + "'")
        with pytest.raises(RecipeError, match=r"extends|isn't UTF-8"):
            load_recipe(str(tmp_path / "r.yaml"))


def test_error_of_extends_names_file_and_line(tmp_path):
    (tmp_path / "top.yaml").write_text("# a\n# b\nextends: base.yaml\n")
    (tmp_path / "base.yaml").write_text("seed: 1\nextends: nothing\n")
    with pytest.raises(RecipeError, match=r"extends: No 'nothing'.*\(base\.yaml line 2\)"):
        load_recipe(str(tmp_path / "top.yaml"))
    (tmp_path / "base.yaml").write_text("seed: 1\nextends: [a]\n")
    with pytest.raises(RecipeError, match=r"extends is \['a'\].*\(base\.yaml line 2\)"):
        load_recipe(str(tmp_path / "top.yaml"))


def test_long_chain_of_extends_is_refused(tmp_path):
    for number in range(40):
        (tmp_path / f"r{number}.yaml").write_text(f"extends: r{number + 1}.yaml\n")
    with pytest.raises(RecipeError, match=r"More than 16 recipes extend each other \(r16\.yaml"):
        load_recipe(str(tmp_path / "r0.yaml"))


def test_typo_of_extends_is_blamed_on_itself(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 3\nextend: rtn-w4g128\n")
    with pytest.raises(RecipeError, match=r"No 'extend' .*Did you mean 'extends'\?.*line 2"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_replaced_list_is_blamed_on_the_file_that_replaced_it(tmp_path):
    base = "weights:\n  method: rtn\n  overrides:\n  - match: x\n    scheme: {num_bits: 3}\n"
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "r.yaml").write_text(
        "extends: base.yaml\nweights:\n  overrides:\n  - {skip: true}\n"
    )
    with pytest.raises(RecipeError, match=r"overrides\.0\.match is missing \(r\.yaml line 4\)"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "setting",
    [
        "seed=-1",
        "seed=4294967296",
        "seed=1.5",
        "calibration.num_samples=1048577",
        "calibration.num_tokens=1e30",
        "calibration.sequence_length=99999999999",
        "calibration.token_cap=.inf",
        "calibration.token_cap=.nan",
        "calibration.holdout=.nan",
        "calibration.holdout=true",
        "calibration.input_error=.nan",
        "weights.scheme.group_size=99999999999",
        "weights.choose.group_dim=[in_features, in_features, out_features]",
        f"calibration.dataset={'x' * 5000}",
        f"weights.method={'x' * 500}",
        f"description={'x' * 5000}",
        f"calibration.tasks=[{'a,' * 200}]",
        ".".join(["a"] * 3000) + "=1",
        "weights.options=" + "[" * 200 + "]" * 200,
    ],
)
def test_every_number_and_text_has_bounds(setting):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"weights": {"method": "rtn"}}, [setting])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "settings",
    [
        ["weights.method=rtn"],
        ["weights={method: rtn}"],
        ["weights.options.rounds=3", "weights.method=rtn", "weights.options={clip_ratio: 0.9}"],
    ],
)
def test_another_method_drops_the_options_of_the_old_one(settings):
    override = {"match": "*", "options": {"rounds": 2}}
    own = {"match": "x", "method": "bcq", "options": {"rounds": 2}}
    weights = {"method": "bcq", "options": {"rounds": 1}, "overrides": [override, own]}
    recipe = recipe_from_mapping({"weights": weights}, settings)
    kept = {key: value for key, value in recipe.weights.options.items() if key != "clip_ratio"}
    assert kept == ({} if len(settings) == 1 else {"rounds": 3})
    assert [one.options for one in recipe.weights.overrides] == [{}, {"rounds": 2}]


def test_same_method_keeps_the_options():
    weights = {"method": "bcq", "options": {"rounds": 1}}
    recipe = recipe_from_mapping({"weights": weights}, ["weights.method=bcq"])
    assert recipe.weights.options == {"rounds": 1}


def test_set_counts_in_a_list():
    weights = {"method": "rtn", "overrides": [{"match": "a"}, {"match": "b"}]}
    settings = ["weights.overrides.1.scheme.num_bits=3", "weights.overrides.0={match: c}"]
    recipe = recipe_from_mapping({"weights": weights}, settings)
    assert [one.match for one in recipe.weights.overrides] == ["c", "b"]
    assert recipe.weights.overrides[1].scheme == {"num_bits": 3}
    for index in ("2", "-1", "x", "9" * 99):
        with pytest.raises(RecipeError, match=r"is no index of a list of 2 \(--set"):
            recipe_from_mapping({"weights": weights}, [f"weights.overrides.{index}.skip=true"])


YAML_TEXT = st.text(
    string.ascii_letters[:6] + " \n\t{}[]:,&*!<>|-?%@`'\"#=0127.~\ufeff\0", max_size=60
)


@given(YAML_TEXT)
def test_any_text_is_a_value_or_one_line(text):
    try:
        parse_value(text, "here")
    except QtoolError as error:
        assert "\n" not in str(error)
