"""Tasks that run what a model writes: asked for twice, in the sandbox, or not at all."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import evaluate as metrics
import pytest

from qtool.errors import DataError
from qtool.evaluation.lm_eval.harness import SANDBOXED
from qtool.evaluation.lm_eval.hooks import task_manager
from qtool.evaluation.lm_eval.task_model import TaskModel
from qtool.sandbox import code_eval as code_metric
from qtool.sandbox.run import run_programs
from tests.evaluation_tasks.conftest import asked_of
from tests.task_rows import SAMPLE

TASKS = [json.loads(line) for line in (SAMPLE / "code/humaneval.jsonl").read_text().splitlines()]


@pytest.fixture
def tag(monkeypatch):
    """A tag of lm-eval's that has a code task; the library itself has none."""
    index = task_manager().task_index
    shipped = index["ai2_arc"]
    assert shipped.kind.name == "TAG"
    monkeypatch.setitem(
        index, "some_code", dataclasses.replace(shipped, tags={"arc_easy", "humaneval"})
    )
    return "some_code"


@pytest.mark.usefixtures("no_model", "tag")
class TestRefusal:
    @pytest.mark.parametrize(
        ("names", "unsafe"),
        [
            (["humaneval"], "humaneval"),
            (["arc_easy", "mbpp"], "mbpp"),
            (["humaneval_infilling"], "humaneval_multi_line_infilling, humaneval_single_"),
            (["some_code"], "humaneval"),
        ],
        ids=["task", "second task", "group", "tag"],
    )
    def test_code_is_not_run_unasked(self, evaluate, names, unsafe):
        with pytest.raises(DataError, match=f"^{unsafe}.*--confirm-run-unsafe-code"):
            evaluate(*names)

    @pytest.mark.parametrize("confirm", [False, True])
    @pytest.mark.parametrize("name", ["cruxeval_output", "longproc", "longproc_countdown_2k"])
    def test_code_that_the_sandbox_cannot_take_over_is_not_run(self, evaluate, name, confirm):
        with pytest.raises(DataError, match=r"^(cruxeval|longproc)_.* isn't run here"):
            evaluate(name, confirm_unsafe=confirm)


def test_every_task_that_runs_code_says_so():
    """lm-eval's flag is what this tool goes by; a new version may bring tasks without it."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    runs = re.compile(r"(?<![\w.])(exec|eval)\(|code_eval")
    running = {
        file.relative_to(root).parts[0]
        for file in root.glob("*/**/*.py")
        if runs.search(file.read_text(encoding="utf-8"))
    }
    tasks = asked_of()
    flagged = {
        tasks._shipped[name].yaml_path.parent.name
        for name in tasks._shipped
        if tasks.unsafe([name]) == [name]
    }
    assert running == flagged
    assert flagged - {"cruxeval", "longproc"} == set(SANDBOXED)


def test_leaves_are_what_lm_eval_loads():
    tasks = asked_of()
    for name in tasks._shipped:
        leaves = tasks.leaves(name)
        assert all(isinstance(leaf, str) for leaf in leaves)
    assert len(tasks.leaves("mmlu")) == len(set(tasks.leaves("mmlu"))) == 57
    assert tasks.leaves("mmlu_astronomy") == ["mmlu_astronomy"]
    assert len(tasks.leaves("mmlu_continuation")) == 57  # a group that writes out its groups
    assert tasks.leaves("ai2_arc") == ["arc_challenge", "arc_easy"]


@pytest.mark.parametrize(
    ("name", "shots"),
    [
        ("mmlu", 5),
        ("mmlu_stem", 5),
        ("mmlu_astronomy", 5),
        ("mmlu_pro", None),
        ("mmlu_flan_cot_zeroshot", None),
        ("mmlu_continuation", None),
        ("arc_easy", None),
        ("flan_held_in", None),  # a group that writes out its tasks
    ],
)
def test_only_mmlu_has_a_customary_number_of_examples(name, shots):
    assert asked_of().shots(name) == shots
    assert asked_of(num_fewshot=2).shots(name) == 2


@pytest.fixture
def programs(monkeypatch, data):
    """The programs that reach the sandbox."""
    for name in ("humaneval", "mbpp"):
        asked_of(name, data_dir=data).load(name)  # lm-eval runs one when it imports a task
    seen: list[str] = []

    def record(sources: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(sources)
        return run_programs(sources, *args, **kwargs)

    monkeypatch.setattr(code_metric, "run_programs", record)
    return seen


def test_confirmed_code_runs_in_the_sandbox(evaluate, programs, monkeypatch, tmp_path):
    canary = tmp_path / "canary"
    solutions = {task["prompt"]: task["canonical_solution"] for task in TASKS}
    broken = TASKS[1]["prompt"]
    solutions[broken] = f"    open({str(canary)!r}, 'w').write('x')\n" + solutions[broken]
    solutions[TASKS[2]["prompt"]] = "    return None\n"

    def answer(_self: Any, requests: Any, **_kwargs: Any) -> list[str]:
        return [solutions[request.args[0]] for request in requests]

    monkeypatch.setattr(TaskModel, "generate_until", answer)
    shipped = metrics.load
    result = evaluate("humaneval", confirm_unsafe=True)
    assert metrics.load is shipped
    (row,) = result.rows
    assert (row.metric, row.value, row.num_items) == ("pass@1", 0.5, 4)
    assert result.model.tasks[0].scores[0].items == (1.0, 0.0, 0.0, 1.0)
    assert len(programs) == 4
    assert all(task["test"] in source for task, source in zip(TASKS, programs, strict=True))
    assert result.protections
    assert not canary.exists()


def test_mbpp_runs_in_the_sandbox(evaluate, programs, monkeypatch):
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"

    def answer(_self: Any, requests: Any, **_kwargs: Any) -> list[str]:
        return [right] + [wrong] * (len(requests) - 1)

    monkeypatch.setattr(TaskModel, "generate_until", answer)
    (row,) = evaluate("mbpp", confirm_unsafe=True).rows
    assert (row.metric, row.value, row.num_items) == ("pass_at_1", pytest.approx(1 / 3), 3)
    assert row.shots == 3
    assert len(programs) == 3


def test_what_the_model_really_writes_runs_too(evaluate, programs, brief_llama):
    (row,) = evaluate("humaneval", model=brief_llama, confirm_unsafe=True, limit=2).rows
    assert (row.value, row.num_items) == (0.0, 2)
    assert len(programs) == 2
