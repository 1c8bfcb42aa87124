"""`--gen-kwargs`: read as lm-eval reads it, refused where it would do nothing, part of what scores
are kept under."""

from collections.abc import Mapping
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from qtool.errors import DataError
from qtool.evaluation.lm_eval.options import parse_generation
from tests.cli.conftest import Cli, cli
from tests.evaluation_tasks.conftest import asked_of

__all__ = ["cli"]  # the fixture


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("max_gen_toks=64", {"max_gen_toks": 64}),
        (
            "do_sample=True,temperature=1,top_p=0.95,top_k=50",
            {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 50},
        ),
        ("do_sample=true, temperature=8e-1", {"do_sample": True, "temperature": 0.8}),
        ("temperature=0", {"temperature": 0.0, "do_sample": False}),
        ("do_sample=False", {"do_sample": False}),
        ("until=Q:", {"until": ["Q:"]}),
        (r'until=["\n\n","a,b"],max_gen_toks=5', {"until": ["\n\n", "a,b"], "max_gen_toks": 5}),
        ("num_beams=2,repetition_penalty=2", {"num_beams": 2, "repetition_penalty": 2.0}),
    ],
)
def test_settings_are_read_as_lm_eval_reads_them(text, settings):
    found = parse_generation(text)
    assert found == settings
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in settings.items()
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperature", "Write it as in do_sample=True,temperature=0.8"),
        ("temprature=0.8", "no 'temprature'. It takes do_sample, temperature"),
        ("max_new_tokens=64", "no 'max_new_tokens'. Write max_gen_toks"),
        ("stop=Q", "no 'stop'. Write until"),
        ("do_sample=1", "do_sample=1, which must be True or False"),
        ("do_sample=yes", "must be True or False"),
        ("do_sample=True,temperature=hot", "temperature='hot', which must be a number from 0"),
        ("do_sample=True,temperature=-1", "must be a number from 0"),
        ("do_sample=True,temperature=nan", "must be a number from 0"),
        ("do_sample=True,temperature=inf", "must be a number from 0"),
        ("do_sample=True,temperature=1,top_p=1.5", "top_p=1.5, which must be a number from 0 to 1"),
        ("max_gen_toks=0", "max_gen_toks=0, which must be a whole number from 1"),
        ("max_gen_toks=6.5", "must be a whole number from 1"),
        ("max_gen_toks=", "must be a whole number from 1"),
        ("until=[Q:", "must be a text, or a list"),
        ("until=[]", "must be a text, or a list"),
        ("until=3", "must be a text, or a list"),
        ("", "it says nothing"),
        (",", "it says nothing"),
        (r"until=\n\n", r"until='.*n', which must be a text, or a list such as"),
        ("temperature=0.8", "has temperature, which .* Add do_sample=True"),
        ("top_p=0.9,top_k=5", "has top_p, top_k, which count only where tokens are drawn"),
        ("temperature=0,top_p=0.9", "has top_p, which count only where tokens are drawn"),
        ("do_sample=False,temperature=0.8", "Add do_sample=True"),
        ("do_sample=True", "without a temperature above 0"),
        ("do_sample=True,temperature=0", "without a temperature above 0"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_mistake_is_found_before_a_model_is_loaded(cli: Cli, long_llama, data, text, words):
    with pytest.raises(DataError, match=f"^--gen-kwargs.*{words}"):
        parse_generation(text)
    options = ["--tasks", "gsm8k", "--data-dir", data, "--gen-kwargs", text]
    done = cli("eval", long_llama, *options)
    assert (done.code, done.out) == (1 if text else 2, "")  # no text at all is a usage error
    assert "--gen-kwargs" in done.err


@pytest.fixture
def written(monkeypatch) -> list[Mapping[str, Any]]:
    """How lm-eval's model class is told to write."""
    found: list[Mapping[str, Any]] = []
    shipped = HFLM.generate_until

    def record(self: HFLM, requests: Any, *args: Any, **kwargs: Any) -> Any:
        found.extend(request.args[1] for request in requests)
        return shipped(self, requests, *args, **kwargs)

    monkeypatch.setattr(HFLM, "generate_until", record)
    return found


def test_settings_reach_the_model_and_leave_the_rest_of_the_task(evaluate, written):
    evaluate("gsm8k", generation={"max_gen_toks": 3}, limit=2)
    evaluate("gsm8k", limit=2)  # nothing of the first run is left in lm-eval's configuration
    changed, shipped = written[:2], written[2:]
    assert [one["max_gen_toks"] for one in changed] == [3, 3]
    assert all("max_gen_toks" not in one for one in shipped)
    assert [{**one, "max_gen_toks": 3} for one in shipped] == changed


def test_settings_are_part_of_what_scores_are_kept_under(evaluate, written):
    first = evaluate("gsm8k", generation={"max_gen_toks": 3}, limit=1)
    assert first.model.tasks[0].settings["generation"] == {"max_gen_toks": 3}
    cached = [
        evaluate("gsm8k", generation=generation, limit=1).model.tasks[0].cached
        for generation in ({"max_gen_toks": 3}, {"max_gen_toks": 4}, {"until": ["w9"]}, {})
    ]
    assert cached == [True, False, False, False]
    assert len(written) == 4


def test_tasks_that_write_nothing_keep_their_scores(evaluate):
    plain = evaluate("arc_easy", limit=2)
    both = evaluate("arc_easy", "gsm8k", generation={"max_gen_toks": 3}, limit=2)
    assert [task.cached for task in both.model.tasks] == [True, False]
    assert both.model.tasks[0].scores == plain.model.tasks[0].scores
    assert "generation" not in both.model.tasks[0].settings


@pytest.mark.usefixtures("no_model")
def test_settings_that_would_apply_to_nothing_are_refused(evaluate):
    with pytest.raises(DataError, match=r"--gen-kwargs .* in arc_easy, wikitext it writes nothing"):
        evaluate("arc_easy", "wikitext", generation={"max_gen_toks": 3})


@pytest.mark.parametrize(("task", "writes"), [("gsm8k", True), ("arc_easy", False)])
def test_tasks_that_write_are_known(data, task, writes):
    tasks = asked_of(task, data_dir=data)
    tasks.check()
    assert tasks.writing == ({task} if writes else set())


def test_what_was_given_is_said_below_the_scores(cli: Cli, long_llama, data):
    options = ["--tasks", "arc_easy,gsm8k", "--data-dir", data, "--limit", "1"]
    done = cli("eval", long_llama, *options, "--gen-kwargs", r'max_gen_toks=3,until=["\n"]')
    assert done.code == 0, done.err
    assert r"Answers were written with max_gen_toks=3, until=['\n']." in done.out
