"""Tasks in `qtool run`: scores against the original by a paired test, what fails, what is kept."""

import pytest

from qtool import pipeline
from qtool.errors import DataError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline import scoring
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.schema import Recipe
from tests.cli.conftest import Cli, cli

__all__ = ["cli"]


def judged_by(tasks, limit, **section) -> Recipe:
    return recipe_from_mapping(
        {
            "weights": {"method": "rtn", "scheme": {"num_bits": 2, "group_size": 32}},
            "eval": {"dataset": None, "tasks": tasks, **section},
            "gates": {"score_loss": limit},
        }
    )


@pytest.fixture
def run(long_llama, data, tmp_path):
    """Return a function that runs a recipe on the tiny llama."""

    def call(recipe, **options):
        given = pipeline.RunOptions(**{"data_dir": data, **options})
        return pipeline.run_recipe(Location(long_llama), tmp_path / "out", recipe, given)

    return call


def test_each_metric_is_a_line_with_the_verdict_of_the_paired_test(run):
    result = run(judged_by(["arc_easy", "wikitext"], {"arc_easy": 1.0, "wikitext": 1e6}))
    names = [line.name for line in result.gates]
    assert names[:2] == [f"gates.score_loss (arc_easy {name})" for name in ("acc", "acc_norm")]
    assert "gates.score_loss (wikitext word_perplexity)" in names
    assert result.passed
    for line in result.gates:
        score = result.figures["scores"][line.of]
        worse = -1 if "arc" in line.of else 1
        assert line.value == pytest.approx(worse * (score["value"] - score["original"]))
        assert line.note in ("identical", "no difference shown", "better", "worse")


def test_no_loss_at_all_is_asked_and_two_bits_are_shown_to_lose(run):
    result = run(judged_by(["wikitext"], 0))
    scores = result.figures["scores"]
    for line in result.gates:
        assert line.value is not None
        assert line.passed == (line.value <= 0 or scores[line.of]["verdict"] != "worse")
    again = run(judged_by(["wikitext"], 0))
    assert again.reused == ("tasks",)
    assert again.gates == result.gates


def test_task_that_fails_fails_its_gate_and_is_run_anew(run, monkeypatch):
    before = load_model

    def broken(location, **settings):
        if location.directory.name == "out":
            raise DataError("the disk is gone")
        return before(location, **settings)

    monkeypatch.setattr(scoring, "load_model", broken)
    result = run(judged_by(["arc_easy"], 1.0))
    (line,) = result.gates
    assert not line.passed
    assert "arc_easy" in line.name
    assert "the disk is gone" in line.note
    assert result.failures == (f"arc_easy on out: {line.note.partition('out: ')[2]}",)
    assert "FAILED: arc_easy on out: " in result.markdown()
    monkeypatch.setattr(scoring, "load_model", before)
    again = run(judged_by(["arc_easy"], 1.0))
    assert again.passed
    assert again.reused == ()


@pytest.mark.parametrize("task", ["arc_eesy", "humaneval"])
def test_unknown_task_and_programs_nobody_agreed_to_are_refused_first(run, tmp_path, task):
    with pytest.raises(DataError, match=r"arc_easy|confirm-run-unsafe-code"):
        run(judged_by([task], 1.0))
    assert not (tmp_path / "out").exists()


def test_task_that_fails_without_a_gate_is_an_error_at_the_end(
    cli: Cli, long_llama, data, tmp_path, monkeypatch
):
    def broken(*_arguments, **_settings):
        raise DataError("the disk is gone")

    monkeypatch.setattr(scoring, "load_model", broken)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("weights: {method: rtn}\neval: {dataset: null, tasks: [arc_easy]}\n")
    done = cli("run", recipe, long_llama, tmp_path / "out", "--data-dir", data)
    assert done.code == 1
    assert "All gates passed, but tasks failed: arc_easy on " in done.err
    assert (tmp_path / "out" / "run" / "run.json").is_file()
