"""Scores on the model card, in the table that `lm_eval` prints."""

import shutil

import pytest
from lm_eval.utils import make_table

from qtool.evaluation.lm_eval.table import results_table
from qtool.evaluation.scores import Score
from qtool.modeling.locate import Location
from qtool.pipeline.card import read_measured


def score(task: str, metric: str, value: float, error: float | None, **values) -> Score:
    given = {
        "filter": "none",
        "higher_is_better": True,
        "num_items": 3,
        "shots": 0,
        "version": "1.0",
        "kind": "mean",
        **values,
    }
    return Score(task=task, metric=metric, value=value, standard_error=error, **given)


def test_table_is_lm_evals_own():
    scores = [
        score("arc_easy", "acc", 0.25, 0.1),
        score("arc_easy", "acc_norm", 0.5, 0.125),
        score("gsm8k", "exact_match", 0.01, 0.001, filter="flexible-extract", shots=5),
        score("wikitext", "word_perplexity", 123.4567, None, higher_is_better=False),
    ]
    theirs = {
        "results": {
            "arc_easy": {
                "alias": "arc_easy",
                "acc,none": 0.25,
                "acc_stderr,none": 0.1,
                "acc_norm,none": 0.5,
                "acc_norm_stderr,none": 0.125,
            },
            "gsm8k": {
                "alias": "gsm8k",
                "exact_match,flexible-extract": 0.01,
                "exact_match_stderr,flexible-extract": 0.001,
            },
            "wikitext": {
                "alias": "wikitext",
                "word_perplexity,none": 123.4567,
                "word_perplexity_stderr,none": "N/A",
            },
        },
        "versions": {"arc_easy": 1.0, "gsm8k": 1.0, "wikitext": 1.0},
        "n-shot": {"arc_easy": 0, "gsm8k": 5, "wikitext": 0},
        "higher_is_better": {
            "arc_easy": {"acc": True, "acc_norm": True},
            "gsm8k": {"exact_match": True},
            "wikitext": {"word_perplexity": False},
        },
    }
    assert results_table(scores) == make_table(theirs).rstrip("\n")


@pytest.fixture
def out_dir(long_checkpoint, tmp_path):
    shutil.copytree(long_checkpoint, tmp_path / "out", dirs_exist_ok=True)
    (tmp_path / "out/measured.json").unlink(missing_ok=True)
    return tmp_path / "out"


def test_scores_of_several_runs_stand_on_the_card(evaluate, out_dir, long_llama):
    evaluate("hellaswag", model=out_dir, baseline=Location(long_llama))
    evaluate("arc_easy", model=out_dir, limit=2)
    card = (out_dir / "README.md").read_text(encoding="utf-8")
    lines = card.splitlines()
    assert any(line.startswith("|hellaswag|") for line in lines)
    assert any(line.startswith("|arc_easy |") for line in lines)
    assert any(line.startswith("| hellaswag | acc | ") for line in lines), "paired"
    assert not any(line.startswith("| arc_easy | acc | ") for line in lines), "no baseline ran"
    assert "- hellaswag: all items, float32 on cpu, " in card
    assert "- arc_easy: first 2 items, float32 on cpu, " in card
    evaluate("arc_easy", model=out_dir, limit=3)
    assert set(read_measured(out_dir).tasks) == {"hellaswag", "arc_easy"}
    assert "first 2 items" not in (out_dir / "README.md").read_text(encoding="utf-8")


def test_members_of_a_group_are_left_out(evaluate, out_dir):
    evaluate("mmlu_social_sciences", model=out_dir, limit=1, num_fewshot=0)
    tasks = read_measured(out_dir).tasks
    (record,) = tasks.values()
    assert {one.task for one in record.scores} == {"mmlu_social_sciences"}
