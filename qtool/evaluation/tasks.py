"""Tasks of lm-eval, run one by one on a model; answers and scores are kept.

Each task runs on its own: the batches that its requests fall into, and so the last digits of its
scores, don't depend on what else was asked for.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qtool.base import Emit, ignore_events
from qtool.errors import DataError, ModelError, QtoolError
from qtool.evaluation import sandbox
from qtool.evaluation.file_digests import files_digest
from qtool.evaluation.harness import SEEDS, Tasks, quiet, templates_compiled_once
from qtool.evaluation.kept_scores import KeptScores
from qtool.evaluation.responses import ResponseStore
from qtool.evaluation.scores import TaskScores, collect_scores
from qtool.modeling.load import LoadedModel, default_device

if TYPE_CHECKING:
    from qtool.evaluation.task_model import TaskModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What is run, and how."""

    tasks: tuple[str, ...]
    """Tasks, groups or tags of lm-eval."""
    data_dir: Path | None = None
    """Folder of local data; None: lm-eval downloads."""
    num_fewshot: int | None = None
    """Examples in the prompt; None: the customary number, else lm-eval's."""
    limit: int | None = None
    """The first items of each task only."""
    batch_size: int | str | None = None
    """Requests per batch, or "auto": the largest that fits, on a card; None: 8, but one at a time
    of windows of whole texts, which are as long as the model's context, and of texts that a model
    writes on a card."""
    max_length: int | None = None
    """Tokens of prompt and answer; None: as many as the model has positions."""
    chat_template: bool = False
    """Put the prompts in the model's chat template."""
    seed: int | None = None
    """Of everything; None: lm-eval's seeds."""
    confirm_unsafe: bool = False
    """Run programs that the model writes."""
    cache: bool = True
    """Keep answers and scores, and use those that are kept."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of python, numpy, torch and the choice of examples."""
        return SEEDS if self.seed is None else (self.seed,) * len(SEEDS)


def check_tasks(options: TaskOptions) -> Tasks:
    """Return the tasks that are asked for; nothing is wrong with them, and no model is loaded yet.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: a task is unknown, its data is missing, or it runs programs unasked.
        QtoolError: a task runs programs, and the sandbox can't be set up here.
    """
    if not options.tasks:
        raise DataError("No task is named. Give some, such as --tasks mmlu,arc_easy.")
    if options.batch_size == "auto" and default_device().type != "cuda":
        raise DataError("--batch-size auto asks how much memory a card has; give a number here.")
    tasks = Tasks(options.data_dir, options.num_fewshot, options.seeds)
    tasks.check(options.tasks, confirm_unsafe=options.confirm_unsafe)
    if tasks.unsafe(options.tasks):
        sandbox.protections()  # raises where there are none: now, not when all is written
    return tasks


def run_tasks(
    load: Callable[[], LoadedModel],
    subject: dict[str, Any],
    tasks: Tasks,
    options: TaskOptions,
    emit: Emit = ignore_events,
) -> tuple[TaskScores, ...]:
    """Run tasks on a model, unless their scores are kept.

    Args:
        load: Loads the model; called if there is anything to run.
        subject: All of the model that decides scores: digest, dtype, device, backend.
        tasks: From `check_tasks`.
        options: The same as there.
        emit: Receives `request` events.
    """
    found: dict[str, TaskScores] = {}
    kept = {name: _kept(name, subject, tasks, options) for name in options.tasks}
    for name, place in kept.items():
        scores = place.read() if options.cache else None
        if scores is not None:
            found[name] = scores
    missing = [name for name in kept if name not in found]
    if missing:
        from qtool.evaluation.task_model import TaskModel  # lm-eval: slow

        with quiet():
            batch, longest = options.batch_size, options.max_length
            model = TaskModel(load(), batch_size=batch, max_length=longest, emit=emit)
        for name in missing:
            found[name] = _run(name, model, tasks, options, kept[name])
        del model
        gc.collect()  # it is in a cycle, and would stay beside the model that is loaded next
    return tuple(found[name] for name in options.tasks)


def _kept(name: str, subject: dict[str, Any], tasks: Tasks, options: TaskOptions) -> KeptScores:
    """Return the place of a task's scores: named by all that decides them."""
    files = tasks.data_files[name]
    data = files_digest(files, remember=options.cache) if files else tasks.hub_data[name]
    return KeptScores(
        {
            "task": name,
            "model": subject,
            "data": data,
            "shots": tasks.shots(name),
            "limit": options.limit,
            "batch size": options.batch_size,
            "longest": options.max_length,
            "chat template": options.chat_template,
            "seed": options.seed,
        }
    )


def _run(
    name: str, model: "TaskModel", tasks: Tasks, options: TaskOptions, kept: KeptScores
) -> TaskScores:
    """Run one task, keeping every answer as it comes.

    Raises:
        ModelError: the card is full, or the model's output isn't a number.
        DataError: lm-eval can't use the rows, or can't score the answers.
    """
    import lm_eval

    started, objects = time.perf_counter(), tasks.load(name)
    leaves = _prepare(objects, tasks.shots(name), options.seeds[-1])
    store = ResponseStore(kept.responses if options.cache else None)
    finished = False
    try:
        model.begin(name, store)
        with _explained(name, model.name), quiet(), templates_compiled_once():
            results = lm_eval.evaluate(
                model,
                {"tasks": leaves, "groups": _groups(objects)},
                limit=options.limit,
                bootstrap_iters=0,  # `scores` has standard errors from the items themselves
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template,
                confirm_run_unsafe_code=options.confirm_unsafe,
            )
        scores = TaskScores(
            name=name,
            scores=collect_scores(results),
            seconds=time.perf_counter() - started,
            truncated=model.truncated,
            settings={**kept.settings, "longest": model.max_length},
        )
        if options.cache:
            kept.write(scores)
        finished = True
    finally:
        store.close(finished=finished)
    return scores


@contextlib.contextmanager
def _explained(task: str, model: str) -> Iterator[None]:
    """Turn what is raised inside the block into errors that say where and what to do."""
    try:
        yield
    except QtoolError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model} ran out of memory in task {task}. Give a smaller --batch-size, or a smaller "
            "--max-length."
        ) from error
    except Exception as error:  # of lm-eval, jinja, metrics: many unrelated types
        reason = " ".join(str(error).split()) or "no reason given"
        raise DataError(
            f"Task {task} stopped on {model}, {type(error).__name__}: {reason}. Check the rows of "
            "its data and the packages that its metric needs; answers that are kept stay."
        ) from error


def _prepare(objects: Iterable[Any], shots: int | None, seed: int) -> dict[str, Any]:
    """Set the number of examples as lm-eval's `simple_evaluate` does; returns tasks by name."""
    leaves: dict[str, Any] = {}
    for one in objects:
        members = one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]
        leaves |= {task.task_name: task for task in members}
    for task in leaves.values():
        fixed = task.get_config("num_fewshot")
        if shots is not None and fixed != 0:  # 0 means that the prompt has its examples already
            task.set_config(key="num_fewshot", value=shots)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return leaves


def _groups(objects: Iterable[Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for one in objects:
        if hasattr(one, "get_all_groups"):
            groups |= {group.name: group for group in [one, *one.get_all_groups()]}
    return groups
