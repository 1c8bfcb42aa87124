"""A task that fails: the others are run, it is said what is missing and why, the exit code is 1."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch

from qtool.base import Progress
from qtool.errors import ModelError, QtoolError
from qtool.evaluation.lm_eval.harness import Tasks
from qtool.evaluation.lm_eval.task_model import TaskModel
from qtool.modeling.locate import Location
from qtool.pipeline import scoring
from qtool.storage.store import Store
from tests.cli.conftest import Cli, cli
from tests.evaluation_tasks.conftest import LoadsModelError
from tests.helpers import warnings_in

__all__ = ["cli"]  # the fixture

THREE = ("lambada_openai", "arc_easy", "wikitext")


@pytest.fixture
def fail(monkeypatch) -> Callable[..., None]:
    """Return a function that has a task fail on a model: (error, task, name of the model)."""

    def prepare(error: BaseException, task: str = "arc_easy", model: str = "") -> None:
        shipped = lm_eval.evaluate

        def evaluate(lm: Any, tasks: Any, **options: Any) -> Any:
            if lm.task == task and lm.name.startswith(model):
                raise error
            return shipped(lm, tasks, **options)

        monkeypatch.setattr(lm_eval, "evaluate", evaluate)

    return prepare


@pytest.fixture
def other(long_llama: Path, tmp_path: Path) -> Path:
    """Return a model with other weights, which a test may change."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "other"
    shutil.copytree(long_llama, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 1.25
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_other_tasks_are_run(evaluate, fail):
    fail(ZeroDivisionError("no\n words"))
    events: list[Any] = []
    result = evaluate(*THREE, emit=events.append)
    assert [task.name for task in result.model.tasks] == ["lambada_openai", "wikitext"]
    assert {row.task for row in result.rows} == {"lambada_openai", "wikitext"}
    (failure,) = result.model.failures
    assert (failure.task, failure.error) == ("arc_easy", "DataError")
    assert failure.message.startswith("Task arc_easy stopped on ")
    assert "ZeroDivisionError: no words. Check the rows" in failure.message
    (warning,) = warnings_in(events)
    assert warning == f"arc_easy failed: {failure.message}"  # at once, not after hours


def test_a_log_has_the_traceback(evaluate, fail, caplog):
    fail(ZeroDivisionError("no words"))
    with caplog.at_level("DEBUG", logger="qtool"):
        evaluate("arc_easy", "wikitext", limit=1)
    assert "Task arc_easy stopped on " in caplog.text
    assert "Traceback" in caplog.text and "ZeroDivisionError: no words" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["card", "host"]
)
def test_full_memory_comes_with_advice(evaluate, fail, error):
    fail(error)
    result = evaluate("arc_easy", "wikitext", limit=1)
    (failure,) = result.model.failures
    assert failure.error == "ModelError"
    assert "arc_easy stopped on" in failure.message
    assert "out of memory. Give a smaller --batch-size" in failure.message
    assert [task.name for task in result.model.tasks] == ["wikitext"]


def test_full_disk_comes_with_advice(evaluate, fail):
    fail(OSError(28, "No space left on device", "/cache"))
    (failure,) = evaluate("arc_easy", limit=1).model.failures
    assert "No space left on device: '/cache'. Answers go to $QTOOL_CACHE;" in failure.message


def test_full_card_in_the_middle_of_a_batch(evaluate, monkeypatch):
    """The real way there, through lm-eval's loop; the next task finds the model as it was."""
    shipped = TaskModel._loglikelihood_tokens

    def fill(self: TaskModel, *args: Any, **options: Any) -> Any:
        if self.task == "arc_easy":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return shipped(self, *args, **options)

    alone = evaluate("lambada_openai", cache=False)
    monkeypatch.setattr(TaskModel, "_loglikelihood_tokens", fill)
    result = evaluate("arc_easy", "lambada_openai")
    assert [one.task for one in result.model.failures] == ["arc_easy"]
    assert result.model.tasks[0].scores == alone.model.tasks[0].scores


def test_data_that_go_missing_while_another_task_runs(evaluate, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)

    def remove(event: Any) -> None:
        if getattr(event, "what", "").startswith("lambada_openai of "):
            (copy / "mcqa/arc_easy_test.jsonl").unlink(missing_ok=True)

    result = evaluate(*THREE, data_dir=copy, emit=remove)
    (failure,) = result.model.failures
    assert failure.task == "arc_easy"
    assert "arc_easy_test.jsonl (or .jsonl.gz), which isn't there" in failure.message
    assert len(result.model.tasks) == 2


def test_data_that_go_missing_while_the_baseline_runs(evaluate, data, tmp_path, long_llama, other):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)

    def remove(event: Any) -> None:
        if getattr(event, "what", "").startswith("wikitext of "):
            (copy / "mcqa/arc_easy_test.jsonl").unlink(missing_ok=True)

    options = {"data_dir": copy, "baseline": Location(long_llama), "model": other}
    result = evaluate(*THREE, **options, emit=remove)
    assert result.original is not None
    assert result.original.failures == ()
    (failure,) = result.model.failures
    assert "arc_easy_test.jsonl (or .jsonl.gz), which isn't there" in failure.message


@pytest.mark.parametrize("cache", [True, False])
def test_data_that_change_while_the_baseline_runs(
    evaluate, data, tmp_path, long_llama, other, cache
):
    """Both models would answer other items, and the scores be kept under the old data."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    file = copy / "mcqa/arc_easy_test.jsonl"

    def cut(event: Any) -> None:
        if getattr(event, "what", "").startswith("wikitext of "):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))

    options = {"data_dir": copy, "baseline": Location(long_llama), "model": other, "cache": cache}
    result = evaluate(*THREE, **options, emit=cut)
    assert result.original is not None
    assert result.original.failures == ()
    (failure,) = result.model.failures
    assert "data of task arc_easy have changed since this run began" in failure.message
    again = evaluate(*THREE, **options)
    rows = {row.task: row for row in again.rows}
    assert rows["arc_easy"].num_items == 3
    assert rows["arc_easy"].paired is not None


@pytest.mark.parametrize("cache", [True, False])
def test_model_that_changes_while_the_baseline_runs(evaluate, other, long_llama, cache):
    def change(event: Any) -> None:
        config = other / "config.json"
        if isinstance(event, Progress) and not config.read_text().endswith(" "):
            config.write_text(config.read_text() + " ")

    options = {"baseline": Location(long_llama), "cache": cache, "model": other, "limit": 1}
    result = evaluate("arc_easy", **options, emit=change)
    assert result.original is not None
    assert result.original.failures == ()
    (failure,) = result.model.failures
    assert failure.message.startswith("The files of other have changed since this run began")
    with Store() as store:
        kept = {one.kind: one.entries for one in store.summary()}
    assert kept.get("scores", 0) == 2 * int(cache)  # of the original, with its rows
    assert evaluate("arc_easy", **options).model.failures == ()


def test_model_that_is_only_touched_is_evaluated(evaluate, other, long_llama):
    def touch(_event: Any) -> None:
        (other / "config.json").touch()

    options = {"baseline": Location(long_llama), "model": other, "limit": 1}
    assert evaluate("arc_easy", **options, emit=touch).model.failures == ()


@pytest.mark.usefixtures("no_model")
def test_file_of_a_model_that_cannot_be_read(cli: Cli, other, data):
    (other / "more.safetensors").symlink_to(other / "nothing")
    done = cli("eval", other, "--tasks", "arc_easy", "--data-dir", data)
    assert (done.code, done.out) == (1, "")
    assert done.said[0].startswith("Error: Can't read ")
    assert "more.safetensors of other: No such file" in done.err


def test_interrupt_stops_all(evaluate, fail):
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate(*THREE)


def test_memory_of_a_failure_is_free_before_the_next_task(evaluate, monkeypatch):
    import gc
    import weakref

    class Large:
        """In a cycle, as lm-eval's objects and the frames of an error are."""

        def __init__(self) -> None:
            self.own = self

    held: list[weakref.ref[Large]] = []
    shipped = lm_eval.evaluate

    def run(lm: Any, tasks: Any, **options: Any) -> Any:
        if lm.task == "arc_easy":
            large = Large()
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("full")
        assert held[0]() is None
        return shipped(lm, tasks, **options)

    monkeypatch.setattr(lm_eval, "evaluate", run)
    gc.disable()
    try:
        result = evaluate("arc_easy", "wikitext", limit=1)
    finally:
        gc.enable()
    assert len(result.model.tasks) == len(result.model.failures) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModelError("It's broken."), "It's broken."),
        (torch.OutOfMemoryError("full"), "can't be loaded: out of memory. It needs a larger card"),
        (RuntimeError("odd"), "can't be loaded, RuntimeError: odd. Check that its files are whole"),
    ],
    ids=["ours", "memory", "other"],
)
def test_model_that_cannot_be_loaded_fails_all_that_is_not_kept(
    evaluate, monkeypatch, error, words
):
    evaluate("lambada_openai")

    def load_model(*_args: Any, **_options: Any) -> Any:
        raise error

    monkeypatch.setattr(scoring, "load_model", load_model)
    result = evaluate(*THREE)
    assert [task.name for task in result.model.tasks] == ["lambada_openai"]
    assert [one.task for one in result.model.failures] == ["arc_easy", "wikitext"]
    assert all(words in one.message for one in result.model.failures)


@pytest.mark.usefixtures("no_model")
def test_files_of_both_models_are_looked_at_before_one_is_loaded(evaluate, long_llama, tmp_path):
    with pytest.raises(LoadsModelError):
        evaluate("arc_easy", baseline=Location(long_llama))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    for model, baseline in ((broken, long_llama), (long_llama, broken)):
        with pytest.raises(QtoolError, match="broken"):
            evaluate("arc_easy", model=model, baseline=Location(baseline))


class TestBeside:
    """One model fails on a task, the other doesn't."""

    def table(self, cli: Cli, model: Path, baseline: Path, data: Path, *options: Any) -> Any:
        tasks = ["--tasks", "lambada_openai,arc_easy", "--data-dir", data, "--limit", 2]
        return cli("eval", model, "--baseline", baseline, *tasks, *options)

    @pytest.fixture(params=["model", "original"])
    def failing(self, request, fail, long_llama, long_checkpoint) -> str:
        name = (long_checkpoint if request.param == "model" else long_llama).name
        fail(ValueError("odd rows"), "arc_easy", name)
        return str(request.param)

    def test_score_of_the_other_is_there(self, cli, failing, long_llama, long_checkpoint, data):
        done = self.table(cli, long_checkpoint, long_llama, data, "--json", "-")
        assert done.code == 1
        report = json.loads(done.out)
        (failure,) = report["failures"]
        name = (long_checkpoint if failing == "model" else long_llama).name
        assert (failure["model"], failure["task"]) == (name, "arc_easy")
        assert failure["error"] == "DataError"
        assert "ValueError: odd rows" in failure["message"]
        rows = {row["task"]: row for row in report["rows"] if row["metric"] == "acc"}
        assert rows["lambada_openai"]["paired"] is not None
        row = rows["arc_easy"]
        assert row["paired"] is None
        assert row["headline"]
        assert (row["value"] is None, row["original"] is None) == (
            failing == "model",
            failing == "original",
        )
        *_, line = done.err.splitlines()
        assert line.startswith(f"Error: Failed: arc_easy on {name}. ")

    def test_table_and_markdown_say_it(
        self, cli, failing, long_llama, long_checkpoint, data, tmp_path
    ):
        target = tmp_path / "table.md"
        done = self.table(cli, long_checkpoint, long_llama, data, "--markdown", target)
        assert done.code == 1
        name = (long_checkpoint if failing == "model" else long_llama).name
        words = f"FAILED: arc_easy on {name}: Task arc_easy stopped on {name}, ValueError: odd rows"
        assert words in " ".join(done.out.split())
        header, _, *rows = target.read_text().splitlines()
        cells = next(row for row in rows if row.startswith("| arc_easy")).split(" | ")
        columns = [cell.strip("| ") for cell in header.split(" | ")]
        values = dict(zip(columns, cells, strict=True))
        assert [values[model.name].strip() == "" for model in (long_checkpoint, long_llama)] == [
            failing == "model",
            failing == "original",
        ]
        assert any(row.startswith(f"- {words}") for row in rows)


def test_run_in_which_all_fails_says_so(cli: Cli, long_llama, data, fail, tmp_path):
    fail(ValueError("odd rows"))
    markdown = tmp_path / "table.md"
    options = ["--tasks", "arc_easy", "--data-dir", data, "--markdown", markdown]
    done = cli("eval", long_llama, *options)
    assert done.code == 1
    assert "FAILED: arc_easy" in done.out
    assert "FAILED: arc_easy" in markdown.read_text()
    assert "| task |" not in markdown.read_text()
    assert "Error: Failed: arc_easy on" in done.err


def test_run_in_which_nothing_fails_has_no_failures(cli: Cli, long_llama, data):
    options = ["--tasks", "arc_easy", "--data-dir", data, "--limit", 1, "--json", "-"]
    done = cli("eval", long_llama, *options)
    assert (done.code, done.said) == (0, [])
    assert json.loads(done.out)["failures"] == []


def test_next_command_runs_only_what_failed(evaluate):
    """A file that is repaired in between, as a user would."""
    shipped, broken = Tasks.load, True

    def load(self: Tasks, name: str) -> Any:
        objects = shipped(self, name)
        if broken and name == "arc_easy":
            for task in objects["tasks"].values():
                task.process_results = None
        return objects

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tasks, "load", load)
        first = evaluate(*THREE)
        broken = False
        second = evaluate(*THREE)
    assert [one.task for one in first.model.failures] == ["arc_easy"]
    assert second.model.failures == ()
    assert [task.cached for task in second.model.tasks] == [True, False, True]
