"""The verdict: limits, margins, what isn't measured, what a paired test excuses, reports."""

from math import nan
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.recipe.load import recipe_from_mapping
from qtool.report.verdict import GateLine, gates_junit, gates_markdown, judge, line_of

FINITE = st.floats(-1e9, 1e9, allow_nan=False)
FIGURES = {
    "size": {"bytes": 1000},
    "perplexity": {"value": 10.0},
    "closeness": {"text": {"kl_mean": 0.1, "same_token": 0.9}, "chats": {"why": "No template."}},
}
SCORE = {"loss": 0.05, "verdict": "worse"}


def lines(gates, figures=FIGURES, **sections):
    values = {"weights": {"method": "rtn"}, "eval": {"tasks": ["arc"]}, **sections}
    return judge(recipe_from_mapping({**values, "gates": gates}), figures)


@given(FINITE, FINITE, st.booleans())
def test_passed_means_a_margin_that_isnt_negative(limit, value, at_least):
    line = line_of("gates.x", "", limit, value, at_least=at_least)
    assert line.margin is not None
    assert line.passed == (line.margin >= 0)
    assert ("FAILED" in line.sentence()) != line.passed


@given(FINITE)
def test_on_the_limit_passes_on_both_sides(limit):
    assert line_of("g", "", limit, limit).passed
    assert line_of("g", "", limit, limit, at_least=True).passed


def test_lines_are_in_the_order_of_the_recipe_one_per_subject():
    found = lines({"same_token": 0.8, "bytes": 999}, eval={"chats": None})
    assert [line.name for line in found] == ["gates.same_token (text)", "gates.bytes"]
    assert [line.passed for line in found] == [True, False]
    assert found[1].sentence() == "gates.bytes: 1,000, at most 999 bytes, margin -1: FAILED"


def test_what_was_not_measured_fails_and_says_why():
    text, chats = lines({"kl_mean": 0.5})
    assert text.passed
    assert not chats.passed
    assert chats.value is None
    assert chats.sentence().endswith(
        "not measured, at most 0.5 nats per token: FAILED: No template."
    )
    assert [line.name for line in lines({"kl_mean": {"text": 0.5}})] == ["gates.kl_mean (text)"]


@pytest.mark.parametrize("value", [None, nan])
def test_perplexity_that_is_no_number_fails(value):
    (line,) = lines({"perplexity": 100}, {"perplexity": {"value": value}})
    assert not line.passed
    assert line.value is None


def test_figures_that_are_missing_fail():
    assert not any(line.passed for line in lines({"perplexity": 9, "kl_mean": 9, "bytes": 9}, {}))


@pytest.mark.parametrize(
    ("loss", "verdict", "passed"),
    [
        (0.05, "worse", False),
        (0.05, "no difference shown", True),
        (0.05, "too few items", True),
        (0.05, "", False),
        (0.01, "worse", True),
        (-0.05, "better", True),
        (None, "", False),
    ],
)
def test_score_fails_only_if_the_loss_is_too_large_and_shown(loss, verdict, passed):
    figures = {"scores": {"arc acc": {"loss": loss, "verdict": verdict}}}
    (line,) = lines({"score_loss": 0.02}, figures)
    assert line.passed == passed
    assert verdict in line.note
    assert line.of == ("arc acc")


def test_every_metric_of_a_task_is_a_line_and_a_task_that_failed_is_one():
    scores = {"arc acc": SCORE, "arc acc_norm": {**SCORE, "loss": 0}, "other acc": SCORE}
    found = lines({"score_loss": 0.02}, {"scores": scores})
    assert [(line.of, line.passed) for line in found] == [
        ("arc acc", False),
        ("arc acc_norm", True),
    ]
    (failed,) = lines({"score_loss": 0.02}, {"scores": {"arc": {"why": "no data"}}})
    assert not failed.passed
    assert failed.note == "no data"


def three() -> tuple[GateLine, ...]:
    return (
        line_of("gates.kl_mean", "text", 0.2, 0.1, unit="nats per token"),
        line_of("gates.bytes", "", 1e6, 2e6, unit="bytes"),
        line_of("check.max_kl", "chats", 0.2, None, note='<a> & "b" | c\x00\n'),
    )


def test_junit_has_a_case_per_gate_and_counts_failures():
    root = ElementTree.fromstring(gates_junit("mine <1>", three(), 12.5))
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("name"), suite.get("time")) == ("mine <1>", "12.500")
    assert [root.get(key) for key in ("tests", "failures", "errors")] == ["3", "2", "0"]
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert [name for name, case in cases.items() if case.find("failure") is not None] == [
        "gates.bytes",
        "check.max_kl (chats)",
    ]
    failure = cases["gates.bytes"].find("failure")
    assert failure is not None
    message = "gates.bytes: 2,000,000, at most 1,000,000 bytes, margin -1,000,000: FAILED"
    assert failure.get("message") == message


def test_markdown_is_a_table_that_odd_texts_dont_break():
    text = gates_markdown("mine", three(), ["torch: 2"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert text.startswith("- **mine: 2 of 3 gates failed**\n")
    assert len(rows) == 5
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}
    assert "<a>" not in text
    assert gates_markdown("mine", three()[:1]).startswith("- **mine: passed**")
    assert gates_markdown("mine", ()) == "- **mine: done, no gates**"
