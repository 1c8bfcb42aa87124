"""Tasks of lm-eval, run one by one on a model; answers and scores are kept.

Each task runs on its own: the batches that its requests fall into, and so the last digits of its
scores, don't depend on what else was asked for.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool.base import Emit, ignore_events
from qtool.errors import DataError, OutputError, QtoolError
from qtool.evaluation import batches
from qtool.evaluation.harness import SEEDS, Tasks
from qtool.evaluation.item_rows import AddRows, kept_rows
from qtool.evaluation.kept_scores import KeptScores
from qtool.evaluation.lm_eval_hooks import quiet
from qtool.evaluation.scores import TaskFailure, TaskScores
from qtool.evaluation.task_run import FULL, explained, run_task
from qtool.modeling.load import LoadedModel
from qtool.sandbox.run import protections

UNFIT = "Check its configuration and its tokenizer."


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
    batch_size: int | str = batches.AUTO
    """Requests per batch, or "auto": as many as `batches` says, and one window of whole texts."""
    max_length: int | None = None
    """Tokens of prompt and answer; None: as many as the model has positions."""
    chat_template: bool = False
    """Put the prompts in the model's chat template."""
    seed: int | None = None
    """Of everything; None: lm-eval's seeds."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """How a model continues prompts, from `parse_generation`; else as each task says."""
    confirm_unsafe: bool = False
    """Run programs that the model writes."""
    cache: bool = True
    """Keep answers and scores, and use those that are kept."""
    samples: Path | None = None
    """Where what was asked and answered goes, one row per item and model."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of python, numpy, torch and the choice of examples."""
        return SEEDS if self.seed is None else (self.seed,) * len(SEEDS)


def check_tasks(options: TaskOptions) -> Tasks:
    """Return the tasks that are asked for; nothing is wrong with them, and no model is loaded yet.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: a task is unknown, its data is missing, it runs programs unasked, or there is
            nothing that the settings of generation apply to.
        QtoolError: a task runs programs, and the sandbox can't be set up here.
    """
    if not options.tasks:
        raise DataError("No task is named. Give some, such as --tasks mmlu,arc_easy.")
    tasks = Tasks(options.data_dir, options.num_fewshot, options.seeds)
    tasks.check(options.tasks, confirm_unsafe=options.confirm_unsafe, remember=options.cache)
    if options.generation and not tasks.writing:
        raise DataError(
            f"--gen-kwargs says how a model writes, and in {', '.join(options.tasks)} it writes "
            "nothing. Leave it out, or add a task such as gsm8k."
        )
    if tasks.unsafe(options.tasks):
        protections()  # raises where there are none: now, not when all is written
    return tasks


def run_tasks(
    load: Callable[[], LoadedModel],
    subject: Mapping[str, Any],
    tasks: Tasks,
    options: TaskOptions,
    emit: Emit = ignore_events,
    add_rows: AddRows | None = None,
) -> tuple[TaskScores | TaskFailure, ...]:
    """Run tasks on a model, unless their scores are kept; one that fails doesn't stop the others.

    Args:
        load: Loads the model, or raises a QtoolError; called if there is anything to run.
        subject: All of the model that decides scores: digest, dtype, device, backend.
        tasks: From `check_tasks`.
        options: The same as there.
        emit: Receives `request` events, and a `warning` for each task that fails.
        add_rows: Receives what was asked and answered, task by task; None: nobody wants it.

    Returns:
        What became of each task, in their order.

    Raises:
        OutputError: rows can't be written.
    """
    found: dict[str, TaskScores | TaskFailure] = {}
    missing: dict[str, KeptScores] = {}
    for name in options.tasks:
        place = _kept(name, subject, tasks, options)
        scores = place.read() if options.cache else None
        rows = kept_rows(place.items) if scores is not None and add_rows is not None else []
        if scores is None or rows is None:
            missing[name] = place
            continue
        found[name] = scores
        if add_rows is not None:
            add_rows(name, rows)
    if missing:
        found |= _run(missing, load, tasks, options, emit, add_rows)
        _free_memory()  # the model is in a cycle, and would stay beside the one that is loaded next
    return tuple(found[name] for name in options.tasks)


def _run(
    missing: Mapping[str, KeptScores],
    load: Callable[[], LoadedModel],
    tasks: Tasks,
    options: TaskOptions,
    emit: Emit,
    add_rows: AddRows | None,
) -> dict[str, TaskScores | TaskFailure]:
    """Run tasks whose scores aren't kept."""
    from qtool.evaluation.task_model import TaskModel  # lm-eval: slow

    try:
        loaded, (batch, longest) = load(), (options.batch_size, options.max_length)
        with explained(f"lm-eval can't take {loaded.name}", full=FULL, other=UNFIT), quiet():
            model = TaskModel(loaded, batch_size=batch, max_length=longest, emit=emit)
    except QtoolError as error:
        return {name: _failure(name, error, emit) for name in missing}
    found: dict[str, TaskScores | TaskFailure] = {}
    for name, place in missing.items():
        try:
            found[name] = run_task(name, model, tasks, options, place, add_rows)
        except OutputError:  # of the rows: the other tasks' go to the same file
            raise
        except QtoolError as error:
            found[name] = _failure(name, error, emit)
        _free_memory()  # of what an error held
    return found


def _failure(task: str, error: QtoolError, emit: Emit) -> TaskFailure:
    emit("warning", {"message": f"{task} failed: {error}"})  # now, not when the others are done
    return TaskFailure(task=task, error=type(error).__name__, message=str(error))


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing, without a card


def _kept(name: str, subject: Mapping[str, Any], tasks: Tasks, options: TaskOptions) -> KeptScores:
    """Return the place of a task's scores: named by all that decides them."""
    applies = bool(options.generation) and name in tasks.writing
    return KeptScores(
        {
            "task": name,
            "model": subject,
            "data": tasks.digests[name],
            "shots": tasks.shots(name),
            "limit": options.limit,
            "batch size": options.batch_size,
            "longest": options.max_length,
            "chat template": options.chat_template,
            "seed": options.seed,
            **({"generation": dict(options.generation)} if applies else {}),
        }
    )
