"""Scores from lm-eval's results: items in order, standard errors, groups, paired comparisons."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.paired import Unit, paired_means, paired_ratios
from qtool.evaluation.scores import TaskScores, collect_scores, compare_scores, standard_error
from qtool.pipeline.task_results import ModelTasks, score_rows

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30)
PAIRS = st.lists(st.tuples(st.floats(-1e3, -1e-3), st.floats(1, 100)), min_size=2, max_size=30)


def sample(doc_id, filter_name="none", **metrics):
    return {"doc_id": doc_id, "filter": filter_name, "metrics": list(metrics), **metrics}


def results(values, metric="acc", *, value=None, task="t", **more):
    """What lm-eval returns for one task with one metric."""
    value = float(np.mean(values)) if value is None else value
    return {
        "results": {task: {"alias": task, f"{metric},none": value, f"{metric}_stderr,none": "N/A"}},
        "samples": {task: [sample(i, **{metric: v}) for i, v in enumerate(values)]},
        "higher_is_better": {task: {metric: True}},
        "n-shot": {task: 2},
        "versions": {task: 1.0},
        **more,
    }


@given(values=VALUES)
def test_standard_error_of_a_mean_is_that_of_numpy(values):
    expected = np.std(values, ddof=1) / math.sqrt(len(values))
    assert standard_error("mean", values) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs=PAIRS)
def test_standard_error_of_a_ratio_is_the_delta_method(pairs):
    logs, weights = np.array(pairs).T
    loss = -logs.sum() / weights.sum()
    covariance = np.cov(logs, weights, ddof=1)
    gradient = np.array([-1, -loss]) / weights.mean()
    error = math.sqrt(max(0.0, gradient @ covariance @ gradient) / len(pairs))
    assert standard_error("bits", pairs) == pytest.approx(error / math.log(2), rel=1e-4, abs=1e-6)
    if loss < 500:
        found = standard_error("perplexity", pairs)
        assert found == pytest.approx(error * math.exp(loss), rel=1e-4, abs=1e-6 * math.exp(loss))


@given(logs=st.lists(st.floats(-20, -0.01), min_size=2, max_size=30))
def test_standard_error_of_a_perplexity_without_weights(logs):
    """That of lambada: the exponential of a mean."""
    error = np.std(logs, ddof=1) / math.sqrt(len(logs)) * math.exp(-np.mean(logs))
    assert standard_error("perplexity", logs) == pytest.approx(error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["mean", "perplexity", "bits", "other"])
def test_one_item_has_no_standard_error(kind):
    assert standard_error(kind, [(-1.0, 2.0)]) is None


def test_other_scores_have_no_standard_error():
    assert standard_error("other", [1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.int64, int, bool, np.bool_])
def test_mean_of_any_kind_of_number_is_a_mean(kind):
    (found,) = collect_scores(results([kind(1), kind(0), kind(1), kind(1)], value=np.float64(0.75)))
    assert (found.kind, found.num_items, found.items) == ("mean", 4, (1.0, 0.0, 1.0, 1.0))
    assert {type(item) for item in found.items} == {float}
    assert type(found.value) is float
    json.dumps(asdict(found))
    assert found.standard_error == pytest.approx(0.25)


def test_items_are_in_the_order_of_the_data():
    shuffled = results([0.0, 1.0, 2.0])
    shuffled["samples"]["t"].reverse()
    (found,) = collect_scores(shuffled)
    assert found.items == (0.0, 1.0, 2.0)
    assert (found.shots, found.version, found.higher_is_better) == (2, "1.0", True)


def test_filters_have_items_of_their_own():
    rows = [sample(i, name, acc=float(name == "b")) for i in range(3) for name in ("a", "b")]
    found = collect_scores({"results": {"t": {"acc,a": 0.0, "acc,b": 1.0}}, "samples": {"t": rows}})
    assert [(s.filter, s.items) for s in found] == [("a", (0.0,) * 3), ("b", (1.0,) * 3)]


@pytest.mark.parametrize(
    "values",
    [
        [("reference", "answer"), ("text", "text")],  # bleu: computed of all at once
        [(["a", "b"], "c"), (["d"], "e")],
        [(1, np.array([0.3, 0.7])), (0, np.array([0.6, 0.4]))],  # brier_score
        ["a", "b"],
        [(1, 0), (1, 1)],  # f1
        [0.0, 0.0],  # numbers whose mean isn't the score
    ],
)
def test_score_of_something_else_has_no_items(values):
    (found,) = collect_scores(results(values, "bleu", value=12.5))
    assert (found.kind, found.items, found.standard_error) == ("other", (), None)
    assert (found.value, found.num_items) == (12.5, 2)
    assert compare_scores(found, found) is None


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("word_perplexity", "perplexity"),
        ("byte_perplexity", "perplexity"),
        ("bits_per_byte", "bits"),
    ],
)
def test_perplexity_has_weighted_items(metric, kind):
    pairs = [(-30.5, 7), (-9.25, 3)]
    value = 39.75 / 10 / math.log(2) if kind == "bits" else math.exp(39.75 / 10)
    report = results(pairs, metric, value=value)
    report["higher_is_better"] = {}
    (found,) = collect_scores(report)
    assert (found.kind, found.items) == (kind, ((-30.5, 7.0), (-9.25, 3.0)))
    assert not found.higher_is_better
    unit: Unit = "bits" if kind == "bits" else "perplexity"
    assert compare_scores(found, found) == paired_ratios(pairs, pairs, unit=unit)


@pytest.mark.parametrize(
    ("items", "value"),
    [
        ([-1.0, -3.0], 12.0),  # a group that averages the perplexities of its tasks
        ([-1.0, -math.inf], math.inf),
        ([-1.0, math.nan], math.nan),
        (["a", "b"], 12.0),
        ([(-1.0, 0), (-2.0, 0)], 12.0),
    ],
)
def test_perplexity_that_its_items_do_not_give_is_not_compared(items, value):
    (found,) = collect_scores(results(items, "perplexity", value=value))
    assert (found.kind, found.items, found.standard_error) == ("other", (), None)
    assert compare_scores(found, found) is None


def grouped():
    """A group of a group and a task, as lm-eval has it."""
    values = {"a": [1.0, 0.0, 1.0], "b": [0.0], "c": [1.0, 1.0]}
    everything = [v for part in values.values() for v in part]
    tasks = {name: {"acc,none": float(np.mean(part))} for name, part in values.items()}
    groups = {
        "inner": {"acc,none": float(np.mean(values["a"] + values["b"]))},
        "outer": {"acc,none": float(np.mean(everything))},
    }
    return {
        "results": {**groups, **tasks},
        "groups": groups,
        "group_subtasks": {"outer": ["inner", "c"], "inner": ["a", "b"]},
        "samples": {n: [sample(i, acc=v) for i, v in enumerate(p)] for n, p in values.items()},
        "higher_is_better": {n: {"acc": True} for n in (*groups, *values)},
        "n-shot": {"a": 5, "b": 5, "c": 5},
        "versions": {},
    }


def test_group_pools_the_items_of_its_members():
    found = {score.task: score for score in collect_scores(grouped())}
    assert found["inner"].items == (1.0, 0.0, 1.0, 0.0)
    assert found["outer"].items == (1.0, 0.0, 1.0, 0.0, 1.0, 1.0)
    assert found["outer"].num_items == 6
    expected = np.std(found["outer"].items, ddof=1) / math.sqrt(6)
    assert found["outer"].standard_error == pytest.approx(expected)
    assert {name for name, score in found.items() if score.group} == {"inner", "outer"}
    assert list(found)[:2] == ["inner", "outer"]


def test_group_that_weighs_its_tasks_alike_has_no_paired_test():
    report = grouped()
    report["results"]["outer"] = report["groups"]["outer"] = {"acc,none": 0.5}
    found = {score.task: score for score in collect_scores(report)}
    assert found["outer"].kind == "other"
    assert found["inner"].kind == "mean"


def of_model(report):
    return ModelTasks(
        "m", 1, 4.0, (TaskScores(name="t", scores=collect_scores(report), seconds=0, truncated=0),)
    )


def test_rows_put_groups_in_the_headline():
    rows = score_rows(of_model(grouped()), None)
    assert {row.task for row in rows if row.headline} == {"inner", "outer"}
    assert {(row.original, row.paired, row.verdict) for row in rows} == {(None, None, "")}
    (row,) = score_rows(of_model(results([1.0, 0.0])), None)
    assert row.headline


def test_rows_compare_item_by_item():
    good, bad = results([1.0] * 20), results([0.0] * 9 + [1.0] * 11)
    (row,) = score_rows(of_model(bad), of_model(good))
    assert (row.value, row.original, row.verdict) == (0.55, 1.0, "worse")
    assert row.paired == paired_means([1.0] * 20, [0.0] * 9 + [1.0] * 11)
    (row,) = score_rows(of_model(good), of_model(bad))
    assert row.verdict == "better"
    (row,) = score_rows(of_model(good), of_model(good))
    assert row.verdict == "identical"


def test_score_that_only_one_model_has_stands_alone():
    (row,) = score_rows(of_model(results([1.0], "acc")), of_model(results([1.0], "f1")))
    assert (row.original, row.paired, row.verdict) == (None, None, "")


def test_unlike_numbers_of_items_are_not_compared():
    first, second = (collect_scores(results([1.0] * n))[0] for n in (3, 4))
    assert compare_scores(first, second) is None
