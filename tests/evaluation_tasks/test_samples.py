"""`--samples`: one row per item, task and model, of a run or of scores that are kept."""

import contextlib
import errno
import gzip
import io
import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import OutputError
from qtool.evaluation.kept import OF_ITEMS
from qtool.evaluation.lm_eval.task_model import TaskModel
from qtool.modeling.locate import Location
from qtool.pipeline import sample_file
from qtool.storage import whole_files
from qtool.storage.plain_json import plain_json
from qtool.storage.store import Store
from tests.cli.conftest import Cli, cli
from tests.evaluation_tasks.conftest import LoadsModelError
from tests.task_rows import SAMPLE

__all__ = ["cli"]  # the fixture

Row = dict[str, Any]


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} isn't JSON")


def read(file: Path) -> list[Row]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt") as lines:
        return [json.loads(line, parse_constant=no_constant) for line in lines]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "samples.jsonl"


def test_row_has_what_was_asked_and_answered(evaluate, target, long_llama):
    evaluate("arc_easy", samples=target)
    rows = read(target)
    assert [row["item"] for row in rows] == list(range(7))
    row = rows[2]
    assert list(row)[:5] == ["model", "baseline", "requested", "task", "item"]
    assert (row["model"], row["baseline"]) == (long_llama.name, False)
    assert row["requested"] == row["task"] == "arc_easy"
    assert row["prompts"] == [row["prompts"][0]] * 4
    assert row["prompts"][0].startswith("Question: w")
    assert row["prompts"][0].endswith("\nAnswer:")
    assert len(set(row["continuations"])) == 4
    assert all(text.startswith(" w") for text in row["continuations"])
    likelihoods = [answer for ((answer, greedy),) in row["answers"] if greedy in (True, False)]
    best = likelihoods.index(max(likelihoods))
    assert row["target"] == 2
    assert row["metrics"]["acc,none"] == float(best == row["target"])
    assert row["filtered"]["none"] == [answer for (answer,) in row["answers"]]


@pytest.mark.parametrize(
    "task", ["arc_easy", "hellaswag", "gsm8k", "wikitext", "lambada_openai", "winogrande"]
)
def test_metrics_of_items_are_those_of_the_scores(evaluate, target, task):
    (found,) = evaluate(task, samples=target).model.tasks
    rows = read(target)
    for score in found.scores:
        values = [row["metrics"][f"{score.metric},{score.filter}"] for row in rows]
        items = [tuple(value) if isinstance(value, list) else value for value in values]
        assert tuple(items) == score.items
        assert len(rows) == score.num_items


def test_prompts_are_those_that_the_model_was_asked(evaluate, target, monkeypatch):
    asked: Counter[str] = Counter()
    shipped = TaskModel.generate_until

    def record(self: TaskModel, requests: Any, **options: Any) -> Any:
        asked.update(request.args[0] for request in requests)
        return shipped(self, requests, **options)

    monkeypatch.setattr(TaskModel, "generate_until", record)
    evaluate("gsm8k", samples=target, num_fewshot=2)
    rows = read(target)
    assert Counter(prompt for row in rows for prompt in row["prompts"]) == asked
    assert all(prompt.count("Question: ") == 3 for prompt in asked)
    for row in rows:
        ((answer,),) = row["answers"]
        assert isinstance(answer, str)
        assert set(row["filtered"]) == {"strict-match", "flexible-extract"}
        assert set(row["metrics"]) == {f"exact_match,{name}" for name in row["filtered"]}
        assert "continuations" not in row


def test_rows_of_two_models_join(evaluate, target, long_llama, long_checkpoint):
    result = evaluate(
        *("arc_easy", "wikitext"),
        model=long_checkpoint,
        baseline=Location(long_llama),
        samples=target,
    )
    rows = read(target)
    names = {True: long_llama.name, False: long_checkpoint.name}
    assert all(row["model"] == names[row["baseline"]] for row in rows)
    of_baseline, of_model = (
        {(row["task"], row["item"]): row for row in rows if row["baseline"] is baseline}
        for baseline in (True, False)
    )
    assert of_baseline.keys() == of_model.keys()
    assert len(of_model) == 14
    for key, row in of_model.items():
        assert row["prompts"] == of_baseline[key]["prompts"]
        assert row["target"] == of_baseline[key]["target"]
    both = [
        [side[key]["metrics"]["acc,none"] for key in side if key[0] == "arc_easy"]
        for side in (of_baseline, of_model)
    ]
    (paired,) = [row.paired for row in result.rows if (row.task, row.metric) == ("arc_easy", "acc")]
    assert paired is not None
    assert paired.original == pytest.approx(sum(both[0]) / 7)
    assert paired.quantized == pytest.approx(sum(both[1]) / 7)


def test_group_has_rows_by_task(cli: Cli, long_llama, target):
    options = ["--tasks", "mmlu", "--data-dir", SAMPLE, "--num-fewshot", "1", "--samples", target]
    assert cli("eval", long_llama, *options).code == 0
    rows = read(target)
    assert len(rows) == 61
    assert len({(row["task"], row["item"]) for row in rows}) == 61
    assert len({row["task"] for row in rows}) > 1
    assert all(row["task"].startswith("mmlu_") for row in rows)


def test_rows_of_a_task_that_was_requested_twice_can_be_told_apart(evaluate, target):
    for _ in range(2):  # run, then kept
        evaluate("ai2_arc", "arc_easy", limit=2, samples=target)
        keys = Counter((row["requested"], row["task"], row["item"]) for row in read(target))
        assert len(keys) == 6
        assert set(keys.values()) == {1}


class TestPrograms:
    def test_it_is_said_what_became_of_each(self, evaluate, target, monkeypatch):
        tasks = [
            json.loads(line) for line in (SAMPLE / "code/humaneval.jsonl").read_text().splitlines()
        ]
        solutions = {task["prompt"]: task["canonical_solution"] for task in tasks}
        solutions[tasks[1]["prompt"]] = "    return None\n"
        solutions[tasks[2]["prompt"]] = "    import numpy\n"

        def answer(_self: Any, requests: Any, **_options: Any) -> list[str]:
            return [solutions[request.args[0]] for request in requests]

        monkeypatch.setattr(TaskModel, "generate_until", answer)
        evaluate("humaneval", confirm_unsafe=True, samples=target)
        rows = read(target)
        assert [row["programs"][0]["status"] for row in rows] == [
            *("passed", "failed", "failed", "passed")
        ]
        assert "AssertionError" in rows[1]["programs"][0]["detail"]
        assert "numpy" in rows[2]["programs"][0]["detail"]
        assert [row["metrics"]["pass@1,create_test"] for row in rows] == [1, 0, 0, 1]
        assert rows[0]["answers"] == [[tasks[0]["canonical_solution"]]]
        assert rows[0]["filtered"]["create_test"][0][0].startswith(tasks[0]["prompt"])

    def test_mbpp_too(self, evaluate, target, monkeypatch):
        right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"

        def answer(_self: Any, requests: Any, **_options: Any) -> list[str]:
            return [right] + [wrong] * (len(requests) - 1)

        monkeypatch.setattr(TaskModel, "generate_until", answer)
        evaluate("mbpp", confirm_unsafe=True, samples=target)
        statuses = [row["programs"][0]["status"] for row in read(target)]
        assert statuses == ["passed", "failed", "failed"]

    def test_other_tasks_have_none(self, evaluate, target):
        evaluate("gsm8k", samples=target, limit=1)
        assert "programs" not in read(target)[0]


class TestKept:
    @pytest.fixture(autouse=True)
    def first(self, evaluate) -> None:
        """Run once, without asking for rows."""
        evaluate("arc_easy", "gsm8k", limit=3)

    def test_kept_scores_have_rows_without_a_model(self, evaluate, target, request, tmp_path):
        fresh = tmp_path / "fresh.jsonl"
        evaluate("arc_easy", "gsm8k", limit=3, samples=fresh, cache=False)
        request.getfixturevalue("no_model")
        result = evaluate("arc_easy", "gsm8k", limit=3, samples=target)
        assert all(task.cached for task in result.model.tasks)
        assert target.read_bytes() == fresh.read_bytes()

    @pytest.mark.usefixtures("no_model")
    def test_scores_without_rows_are_evaluated_again(self, evaluate, target):
        with sqlite3.connect(Store().path) as connection:
            connection.execute("DELETE FROM kept WHERE kind = 'scores' AND key = ?", (OF_ITEMS,))
        connection.close()
        with pytest.raises(LoadsModelError):
            evaluate("arc_easy", limit=3, samples=target)
        assert not target.exists()


def test_run_without_cache_keeps_no_rows(evaluate, own_cache, target):
    evaluate("arc_easy", limit=1, cache=False, samples=target)
    assert len(read(target)) == 1
    assert not own_cache.exists()


def test_interrupted_run_has_all_rows_when_it_goes_on(evaluate, target, tmp_path):
    whole = tmp_path / "whole.jsonl"
    evaluate("arc_easy", batch_size=1, cache=False, samples=whole)
    left = 9

    def emit(_event: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("arc_easy", batch_size=1, samples=target, emit=emit)
    assert list(tmp_path.glob("samples*")) == []
    evaluate("arc_easy", batch_size=1, samples=target)
    assert target.read_bytes() == whole.read_bytes()


def test_task_that_fails_has_no_rows(evaluate, target, monkeypatch):
    shipped = TaskModel.loglikelihood

    def answer(self: TaskModel, requests: Any, **options: Any) -> Any:
        if self.task == "arc_easy":
            raise ValueError("x")
        return shipped(self, requests, **options)

    monkeypatch.setattr(TaskModel, "loglikelihood", answer)
    evaluate("lambada_openai", "arc_easy", "hellaswag", samples=target, limit=2)
    assert Counter(row["task"] for row in read(target)) == {"lambada_openai": 2, "hellaswag": 2}


def test_drawn_answers_follow_the_seed(evaluate, tmp_path):
    drawn = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 6, "until": ["w96"]}
    found = []
    for number, seed in enumerate((3, 3, 4)):
        target = tmp_path / f"{number}.jsonl"
        evaluate("gsm8k", generation=drawn, seed=seed, num_fewshot=0, cache=False, samples=target)
        found.append([row["answers"] for row in read(target)])
    assert found[0] == found[1] != found[2]


def test_gzipped_rows_are_the_same(cli: Cli, long_llama, data, tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    options = ["eval", long_llama, "--tasks", "arc_easy", "--data-dir", data, "--limit", "2"]
    for target in (plain, packed):
        done = cli(*options, "--samples", target)
        assert (done.code, done.said) == (0, [])
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


class FullDisk(io.BytesIO):
    """What a file on it does."""

    def write(self, _content: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kept", [True, False])
def test_full_disk_is_said_and_loses_no_scores(evaluate, target, monkeypatch, request, kept):
    if kept:
        evaluate("arc_easy", limit=1)

    @contextlib.contextmanager
    def written_whole(file: Path) -> Any:
        with whole_files.written_whole(file) as opened:
            yield FullDisk() if file == target else opened

    monkeypatch.setattr(sample_file, "written_whole", written_whole)
    with pytest.raises(OutputError, match=r"samples\.jsonl: No space left .* another file runs"):
        evaluate("arc_easy", "wikitext", limit=1, samples=target)
    assert not target.exists()
    request.getfixturevalue("no_model")
    assert evaluate("arc_easy", limit=1).model.tasks[0].cached


def test_link_to_a_file_stays_a_link(evaluate, target, tmp_path):
    target.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        evaluate("arc_easy", limit=1, samples=target)
        assert target.is_symlink()
        assert len(read(target)) == 1


@pytest.mark.usefixtures("no_model")
def test_device_is_not_replaced_by_a_file(evaluate, target):
    os.mkfifo(target)
    with pytest.raises(OutputError, match="isn't an ordinary file"):
        evaluate("arc_easy", limit=1, samples=target)
    assert target.is_fifo()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("other", ["--json", "--markdown"])
def test_two_results_do_not_go_to_one_file(cli: Cli, long_llama, data, tmp_path, other):
    options = ["--tasks", "arc_easy", "--data-dir", data, "--samples", tmp_path / "x"]
    done = cli("eval", long_llama, *options, other, tmp_path / "." / "x")
    assert done.code == 2
    assert "Two results can't go to" in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nothing/x.jsonl", 1, "there is no folder"),
        ("folder", 1, "it is a folder"),
        ("-", 2, "--samples takes the name of a file"),
    ],
)
def test_file_that_cannot_be_written_is_found_first(
    cli: Cli, long_llama, data, tmp_path, name, code, words
):
    (tmp_path / "folder").mkdir()
    target = name if name == "-" else tmp_path / name
    done = cli("eval", long_llama, "--tasks", "arc_easy", "--data-dir", data, "--samples", target)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_samples_need_tasks(cli: Cli, llama):
    done = cli("eval", llama, "--samples", "x.jsonl")
    assert done.code == 2
    assert "--samples needs --tasks" in done.err


def test_numbers_that_json_does_not_have_are_null():
    import numpy as np

    values = [float("nan"), float("-inf"), np.float32("inf"), np.float32(0.5), np.int64(3)]
    values += [np.bool_(True), True, (1, "a"), {1: {"x"}}, np.arange(2), None]
    expected = [None, None, None, 0.5, 3, True, True, [1, "a"], {"1": ["x"]}, [0, 1], None]
    found = plain_json(values)
    assert found == expected
    assert [type(one) for one in found] == [type(one) for one in expected]
    json.dumps(found, allow_nan=False)
