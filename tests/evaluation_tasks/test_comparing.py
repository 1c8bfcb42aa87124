"""`qtool compare --tasks`: scores of several models, each paired with the first's."""

import json
from typing import Any

import pytest

from qtool.core.paired import mcnemar_p
from tests.cli.conftest import Cli, cli

__all__ = ["cli"]  # the fixture


def report(cli: Cli, *arguments: Any) -> Any:
    done = cli("compare", *arguments, "--json", "-")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture
def arguments(data) -> list[Any]:
    return ["--tasks", "hellaswag,wikitext", "--data-dir", data, "--no-texts"]


def test_each_score_is_paired_with_the_firsts(
    cli: Cli, long_llama, long_checkpoint, brief_llama, arguments
):
    value = report(cli, long_llama, long_checkpoint, brief_llama, *arguments)
    first, *others = value["models"]
    assert [row["paired"] for row in first["rows"]] == [None] * 5
    assert value["noise"] is None
    for other in others:
        assert [row["metric"] for row in other["rows"]] == [row["metric"] for row in first["rows"]]
        for row, beside in zip(other["rows"], first["rows"], strict=True):
            paired = row["paired"]
            assert row["original"] == beside["value"]
            assert paired["difference"] == pytest.approx(row["value"] - beside["value"])
            assert paired["items"] == row["num_items"] == beside["num_items"]
            if row["metric"].startswith("acc"):
                assert paired["p_value"] == mcnemar_p(paired["improved"], paired["worsened"])
            else:
                assert paired["standard_error"] > 0
    assert '"items"' not in json.dumps([one["tasks"]["tasks"] for one in value["models"]])


def test_scores_are_those_of_eval(cli: Cli, long_llama, long_checkpoint, arguments):
    of_compare = report(cli, long_llama, long_checkpoint, *arguments)
    options = [*arguments[:-1], "--baseline", long_llama, "--json", "-"]
    of_eval = json.loads(cli("eval", long_checkpoint, *options).out)
    assert of_compare["models"][1]["rows"] == of_eval["rows"]
    assert all(task["cached"] for task in of_eval["model"]["tasks"]), "one cache for both commands"


def test_tables_have_a_row_for_each_score_and_model(
    cli: Cli, long_llama, long_checkpoint, brief_llama, arguments, tmp_path
):
    file, rows = tmp_path / "t.md", tmp_path / "rows.jsonl"
    models = [long_llama, long_checkpoint, brief_llama]
    done = cli("compare", *models, *arguments, "--markdown", file, "--samples", rows)
    assert done.code == 0, done.err
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "| acc |" in line]
    assert [line.split("|")[5].strip() for line in lines] == [model.name for model in models]
    assert "Differences are to " in done.out
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["model"]: row["baseline"] for row in kept} == {
        model.name: number == 0 for number, model in enumerate(models)
    }
