"""Runs that stop and go on, scores that are kept, requests that are too long."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qtool.base import Progress
from qtool.evaluation.lm_eval import batches
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.evaluation.scores import TaskFailure, TaskScores
from qtool.modeling.locate import Location
from qtool.pipeline.task_results import TaskComparison
from qtool.storage.jsonl import json_objects
from qtool.storage.memo import Memo
from qtool.storage.store import Store
from tests.evaluation_tasks.conftest import LoadsModelError, asked_of, kept_answers

Asked = list[Any]
INPUTS = {"lambada_openai": 7, "arc_easy": 28, "wikitext": 7, "gsm8k": 4}
"""Requests of each task."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Return a list of the requests that reach lm-eval's model class."""
    found: Asked = []

    def record(name: str, of: Callable[[Any], Asked]) -> None:
        shipped = getattr(HFLM, name)

        def call(self: HFLM, requests: Any, *args: Any, **kwargs: Any) -> Any:
            found.extend(of(requests))
            return shipped(self, requests, *args, **kwargs)

        monkeypatch.setattr(HFLM, name, call)

    record("_loglikelihood_tokens", lambda rs: [text for text, _, _ in rs if text is not None])
    record("loglikelihood_rolling", lambda rs: [r.args for r in rs])
    record("generate_until", lambda rs: [r.args[0] for r in rs])
    return found


def stop_after(count: int) -> Callable[[Any], None]:
    """Return what Ctrl-C does to a run, after some requests."""
    left = count

    def emit(event: Any) -> None:
        nonlocal left
        assert isinstance(event, Progress)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    return emit


def scores_of(result: TaskComparison) -> Any:
    return [task.scores for task in result.model.tasks]


@pytest.mark.parametrize(
    ("task", "options", "stop"),
    [
        ("lambada_openai", {"batch_size": 2}, 4),
        ("arc_easy", {"batch_size": 4}, 12),
        ("wikitext", {}, 3),
        ("gsm8k", {"batch_size": 1}, 2),
    ],
)
def test_interrupted_run_goes_on(evaluate, asked, task, options, stop):
    whole = evaluate(task, **options, cache=False)
    assert len(asked) == INPUTS[task]
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, **options, emit=stop_after(stop))
    assert kept_answers() == stop
    asked.clear()
    events: list[Any] = []
    rest = evaluate(task, **options, emit=events.append)
    assert len(asked) == INPUTS[task] - stop
    assert scores_of(rest) == scores_of(whole)
    assert kept_answers() == 0
    assert [e.done for e in events] == list(range(stop + 1, INPUTS[task] + 1))
    assert {(e.total, e.what.partition(" of ")[0]) for e in events} == {(INPUTS[task], task)}


def test_run_whose_answers_were_damaged_asks_for_those_again(evaluate, asked):
    whole = evaluate("lambada_openai", batch_size=1, cache=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate("lambada_openai", batch_size=1, emit=stop_after(5))
    with Store() as store:
        content = store.path.read_bytes()
        place = content.rindex(b", false]")
        store.path.write_bytes(content[:place] + b", fblse]" + content[place + 8 :])
    asked.clear()
    assert scores_of(evaluate("lambada_openai", batch_size=1)) == scores_of(whole)
    assert len(asked) == 3


def test_interrupted_run_of_other_settings_does_not_count(evaluate, asked):
    with pytest.raises(KeyboardInterrupt):
        evaluate("lambada_openai", batch_size=1, emit=stop_after(5))
    asked.clear()
    evaluate("lambada_openai", batch_size=2)
    assert len(asked) == INPUTS["lambada_openai"]


@pytest.mark.parametrize("task", ["arc_easy", "lambada_openai", "gsm8k"])
def test_batches_by_length_give_the_same_scores(evaluate, monkeypatch, task):
    shapes: list[tuple[int, ...]] = []
    call = HFLM._model_call

    def counted(self: HFLM, inps: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inps.shape))
        return call(self, inps, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    monkeypatch.setattr(batches, "tokens_read_at_once", lambda *_: 100)
    (by_length,) = scores_of(evaluate(task, batch_size="auto"))
    assert all(rows * width <= 100 or rows == 1 for rows, width in shapes)
    if task != "gsm8k":
        assert any(rows > 1 for rows, _ in shapes)
        assert len({rows for rows, _ in shapes}) > 1
    (alone,) = scores_of(evaluate(task, batch_size=1))
    for one, other in zip(by_length, alone, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5)


def test_interrupted_run_in_batches_by_length_goes_on(evaluate, asked, monkeypatch):
    monkeypatch.setattr(batches, "tokens_read_at_once", lambda *_: 100)
    whole = evaluate("arc_easy", batch_size="auto", cache=False)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate("arc_easy", batch_size="auto", emit=stop_after(9))
    asked.clear()
    rest = evaluate("arc_easy", batch_size="auto")
    assert 0 < len(asked) <= INPUTS["arc_easy"] - 9
    assert scores_of(rest) == scores_of(whole)


def test_finished_task_stays_when_the_next_one_stops(evaluate, asked):
    with pytest.raises(KeyboardInterrupt):
        evaluate("lambada_openai", "arc_easy", batch_size=1, emit=stop_after(7 + 4))
    asked.clear()
    result = evaluate("lambada_openai", "arc_easy", batch_size=1)
    assert [task.cached for task in result.model.tasks] == [True, False]
    assert len(asked) == 28 - 4


@pytest.mark.usefixtures("no_model")
class TestKept:
    """No model is loaded for scores that are kept."""

    @pytest.fixture(autouse=True)
    def before(self, long_llama: Path, data: Path) -> Any:
        """Run once, with the real way to load a model."""
        from qtool.evaluation.lm_eval.run import run_tasks
        from qtool.modeling.digest import model_digest
        from qtool.modeling.load import load_model

        tasks = asked_of("lambada_openai", data_dir=data)
        tasks.check()
        subject: dict[str, Any] = {
            "digest": model_digest(long_llama),
            "dtype": "float32",
            "device": "cpu",
            "backend": None,
            "switches": {},
        }
        (self.scores,) = run_tasks(lambda: load_model(Location(long_llama)), subject, tasks)
        assert isinstance(self.scores, TaskScores)

    def test_scores_come_from_the_first_run(self, evaluate):
        (task,) = evaluate("lambada_openai").model.tasks
        assert task.cached
        assert isinstance(self.scores, TaskScores)
        assert task.scores == self.scores.scores
        assert task.settings == self.scores.settings
        assert task.settings["longest"] == 2048

    @pytest.mark.parametrize(
        "options",
        [
            {"limit": 3},
            {"num_fewshot": 1},
            {"batch_size": 8},
            {"max_length": 64},
            {"seed": 3},
            {"dtype": torch.bfloat16},
            {"backend": "reference"},
            {"cache": False},
            {"chat_template": True},
        ],
    )
    def test_other_options_are_another_run(self, evaluate, options):
        with pytest.raises(LoadsModelError):
            evaluate("lambada_openai", **options)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_other_file_of_the_model_is_another_run(self, evaluate, long_llama, tmp_path, name):
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in long_llama.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        evaluate("lambada_openai", model=copy)
        content = (copy / name).read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        (copy / name).write_bytes(content + b"\n" if name.endswith(".json") else flipped)
        with pytest.raises(LoadsModelError):
            evaluate("lambada_openai", model=copy)

    def test_other_data_is_another_run(self, evaluate, data, tmp_path):
        file = "lm/lambada_openai_test.jsonl"
        (tmp_path / "lm").mkdir()
        (tmp_path / file).write_bytes((data / file).read_bytes())
        evaluate("lambada_openai", data_dir=tmp_path)
        (tmp_path / file).write_text('{"text": "w3 w4 w5"}\n')
        with pytest.raises(LoadsModelError):
            evaluate("lambada_openai", data_dir=tmp_path)

    def test_damaged_scores_are_another_run(self, evaluate):
        with Store() as store:
            content = store.path.read_bytes()
            assert content.count(b'"perplexity"')
            store.path.write_bytes(content.replace(b'"perplexity"', b'"perplexitx"'))
        with pytest.raises(LoadsModelError):
            evaluate("lambada_openai")


def test_no_cache_leaves_nothing(evaluate, own_cache):
    evaluate("lambada_openai", cache=False, limit=2)
    assert not own_cache.exists()


@pytest.mark.parametrize("task", ["arc_easy", "wikitext"])
def test_outputs_that_are_not_numbers_are_a_failure_at_once(long_llama, data, task):
    from qtool.evaluation.lm_eval.run import run_tasks
    from qtool.modeling.load import load_model

    def load() -> Any:
        loaded = load_model(Location(long_llama))
        loaded.model.lm_head.weight.data.fill_(float("nan"))
        return loaded

    tasks = asked_of(task, data_dir=data)
    tasks.check()
    (failure,) = run_tasks(load, {}, tasks)
    assert isinstance(failure, TaskFailure)
    assert failure.error == "ModelError"
    assert f"not numbers, in task {task}" in failure.message
    assert kept_answers() == 0


def words(text: str) -> int:
    """Return the tokens of a text: the tiny tokenizer splits off punctuation."""
    return len(re.findall(r"\w+|[^\w\s]+", text))


def test_truncated_requests_are_counted(evaluate, data):
    longest = 13
    expected = 0
    for row in json_objects(data / "mcqa/arc_easy_test.jsonl"):
        for choice in row["choices"]["text"]:
            expected += words(f"Question: {row['question']}\nAnswer: {choice}") > longest + 1
    assert 0 < expected < INPUTS["arc_easy"]
    (task,) = evaluate("arc_easy", max_length=longest).model.tasks
    assert task.truncated == expected
    assert task.settings["longest"] == longest


def test_truncated_requests_are_counted_in_the_rest_too(evaluate):
    (whole,) = evaluate("arc_easy", max_length=13, batch_size=1, cache=False).model.tasks
    with pytest.raises(KeyboardInterrupt):
        evaluate("arc_easy", max_length=13, batch_size=1, emit=stop_after(9))
    (rest,) = evaluate("arc_easy", max_length=13, batch_size=1).model.tasks
    assert rest.truncated == whole.truncated > 0


def test_truncated_prompts_of_answers_are_counted(evaluate):
    (task,) = evaluate("gsm8k", max_length=2000).model.tasks
    assert task.truncated == 0
    (task,) = evaluate("gsm8k", max_length=256 + 40).model.tasks
    assert task.truncated == INPUTS["gsm8k"]


def test_whole_texts_are_windows_and_not_truncated(evaluate):
    (task,) = evaluate("wikitext", max_length=16).model.tasks
    assert task.truncated == 0


def test_answers_that_cannot_fit_are_a_failure(evaluate):
    (failure,) = evaluate("gsm8k", max_length=200).model.failures
    assert re.search(r"gsm8k lets a model write 256 tokens, .* holds 200 ", failure.message)


@pytest.fixture(scope="module")
def model(long_llama):
    from qtool.evaluation.lm_eval.task_model import TaskModel
    from qtool.modeling.load import load_model

    return TaskModel(load_model(Location(long_llama), device="cpu"), TaskOptions(tasks=()))


def answers(model, count=6, **generation):
    """Ask for the same continuation some times."""
    model.begin("t", Memo())
    arguments = ("w3 w4", {"until": ["w96"], "max_gen_toks": 6, **generation})
    request = Instance("generate_until", {}, arguments, 0, ("t", 0, count))
    torch.manual_seed(0)
    return model.generate_until([request] * count)


@pytest.mark.parametrize(
    "generation",
    [{"do_sample": True, "temperature": 1.0}, {"temperature": 1.0}],
)
def test_drawn_answers_differ_and_are_not_kept(model, generation):
    first = answers(model, **generation)
    assert len(set(first)) > 1
    assert answers(model, **generation) == first  # the seed decides
    assert model.store._values == {}


@pytest.mark.parametrize("generation", [{"do_sample": False}, {}, {"temperature": 0.0}])
def test_likeliest_answers_are_equal_and_kept(model, generation):
    assert len(set(answers(model, **generation))) == 1
    assert len(model.store._values) == 1
