"""Gates in a recipe: known, measured and sensible, or refused with the place."""

import pytest

from qtool.data.corpora import bundled
from qtool.errors import RecipeError
from qtool.evaluation.closeness import CHATS, PLAIN
from qtool.recipe.gates import EACH, GATE_OF, GATES, MEASUREMENTS, subjects
from qtool.recipe.load import load_recipe, recipe_from_mapping
from qtool.recipe.measuring import MEASURING, EvalSection
from qtool.recipe.names import in_folders

PLAIN_RECIPE = {"weights": {"method": "rtn"}}
ALL = {**PLAIN_RECIPE, "eval": {"tasks": ["arc_easy"]}, "bench": {"gpu": True}}


def refused(values, *settings) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(values, settings)
    return str(caught.value)


def test_names_are_given_once_and_measurements_are_known():
    assert len(GATE_OF) == len(GATES)
    assert {gate.measurement for gate in GATES} == set(MEASUREMENTS)
    assert all(gate.lowest < gate.highest for gate in GATES)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_gate_is_taken_where_it_is_measured_and_refused_where_it_isnt(gate):
    assert recipe_from_mapping({**ALL, "gates": {gate.name: 0.5}}).gates == {gate.name: 0.5}
    alone = {**PLAIN_RECIPE, "gates": {gate.name: 0.5}}
    if gate.measurement in ("size", "cost"):
        assert recipe_from_mapping(alone).gates == {gate.name: 0.5}
        return
    message = refused(alone)
    assert message.startswith(f"gates.{gate.name} needs a section '")
    assert message.endswith("which the recipe doesn't have (the options).")
    with_key = refused(PLAIN_RECIPE, f"gates.{gate.name}=0.5")
    assert with_key.endswith(f"(--set gates.{gate.name}=0.5).")


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_gate_takes_a_limit_per_subject_where_it_has_some(gate):
    chosen = recipe_from_mapping(ALL)
    of = subjects(gate, chosen)
    assert bool(of) == (EACH in gate.reads)
    values = {**ALL, "gates": {gate.name: dict.fromkeys(of or ("text",), 0.5)}}
    if of:
        assert recipe_from_mapping(values).gates == values["gates"]
        first = of[0]
        near = refused(ALL, f"gates.{gate.name}={{{first}x: 0.5}}")
        assert f"Did you mean '{first}'?" in near
    else:
        assert "has one value; it takes one number" in refused(values)


@pytest.mark.parametrize(
    ("without", "gate"),
    [
        ("eval.baseline=false", "perplexity_ratio"),
        ("eval.baseline=false", "kl_mean"),
        ("eval.baseline=false", "score_loss"),
        ("eval.dataset=null", "perplexity"),
        ("eval.dataset=null", "kl_p99"),
        ("eval.tasks=[]", "score_loss"),
        ("bench.gpu=false", "copy_share"),
    ],
)
def test_gate_without_its_measurement_is_refused(without, gate):
    assert f"gates.{gate} needs" in refused({**ALL, "gates": {gate: 0.5}}, without)


def test_chats_that_are_left_out_are_no_subject():
    message = refused({**ALL, "gates": {"kl_mean": {"chats": 0.1}}}, "eval.chats=null")
    assert "No 'chats' in what gates.kl_mean is measured on" in message


def test_unknown_gate_is_refused_with_nearest_and_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("weights: {method: rtn}\neval: {}\ngates:\n  bytes: 5\n  kl_men: 0.1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert str(caught.value).startswith("No 'kl_men' in gates. Did you mean 'kl_mean'? Known: ")
    assert str(caught.value).endswith("(mine.yaml line 5).")
    assert caught.value.key == "gates.kl_men"


def test_gate_of_an_extended_recipe_has_the_place_there(tmp_path):
    (tmp_path / "base.yaml").write_text("weights: {method: rtn}\ngates:\n  same_token: 0.9\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(RecipeError, match=r"\(base.yaml line 3\)"):
        load_recipe(str(tmp_path / "top.yaml"))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("'0.1'", "it should be a number"),
        ("true", "it should be a number"),
        (".nan", "it should be a number"),
        (".inf", "it should be a number"),
        ("{}", "it should be a number"),
        ("[0.1]", "it should be a number"),
        ("{text: [0.1]}", "it should be a number"),
        ("-1", "it should be from 0"),
        ("{text: -1}", "gates.kl_mean.text is -1"),
    ],
)
def test_limit_that_is_none_is_refused(limit, words):
    message = refused(ALL, f"gates.kl_mean={limit}")
    assert words in message
    assert message.endswith(f"(--set gates.kl_mean={limit}).")


def test_share_in_percent_is_refused():
    assert "is 90; it should be from 0 to 1" in refused(ALL, "gates.same_token=90")


def test_null_lifts_a_gate_and_all_gates():
    values = {**ALL, "gates": {"bytes": 5, "kl_mean": 0.1}}
    assert recipe_from_mapping(values, ["gates.bytes=null"]).gates == {"kl_mean": 0.1}
    assert recipe_from_mapping(values, ["gates=null"]).gates == {}


def test_absent_sections_arent_dumped_and_all_can_be_left_out():
    plain = recipe_from_mapping(PLAIN_RECIPE).model_dump(mode="json")
    assert not set(MEASURING) & set(plain)
    full = recipe_from_mapping({**ALL, "model": "m", "check": {}, "gates": {"bytes": 5}})
    assert set(MEASURING) <= set(full.model_dump(mode="json"))
    assert full.without_measuring() == recipe_from_mapping(PLAIN_RECIPE)
    assert recipe_from_mapping(full.model_dump(mode="json")) == full


def test_defaults_name_what_is_bundled():
    section = EvalSection()
    assert (section.dataset, section.chats) == (PLAIN, CHATS)
    assert {PLAIN, CHATS} <= set(bundled())


def test_recipes_in_folders_are_found_and_a_slip_is_told():
    assert "ci/smoke" in in_folders()
    assert load_recipe("ci/smoke").gates
    with pytest.raises(RecipeError, match=r"Did you mean 'ci/smoke'\? Known: ci/"):
        load_recipe("ci/smok")
