"""Tasks of lm-eval, run one by one on a model; answers and scores are kept.

Each task runs on its own: the batches that its requests fall into, and so the last digits of its
scores, don't depend on what else was asked for.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from qtool.base import Emit, Notice, ignore_events
from qtool.errors import DataError, ModelError, OutputError, QtoolError
from qtool.evaluation.kept import KeptTask
from qtool.evaluation.lm_eval.harness import Loaded, Tasks, writes_text
from qtool.evaluation.lm_eval.hooks import quiet, templates_compiled_once
from qtool.evaluation.lm_eval.item_rows import AddRows, item_rows
from qtool.evaluation.scores import TaskFailure, TaskScores, collect_scores
from qtool.modeling.device import free_memory
from qtool.modeling.load import LoadedModel
from qtool.sandbox.code_eval import recorded_outcomes
from qtool.storage.store import Store

if TYPE_CHECKING:
    from qtool.evaluation.lm_eval.task_model import TaskModel

_LOG = logging.getLogger(__name__)

SMALLER = "Give a smaller --batch-size, or a smaller --max-length."
UNFIT = "Check its configuration and its tokenizer."
DISK = "Answers go to $QTOOL_CACHE; --no-cache keeps none."
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
DATA = (
    "Check the rows of its data and the packages that its metric needs; answers that are kept stay."
)
TaskOutcome = TaskScores | TaskFailure


def run_tasks(
    load: Callable[[], LoadedModel],
    subject: Mapping[str, Any],
    tasks: Tasks,
    emit: Emit = ignore_events,
    add_rows: AddRows | None = None,
) -> tuple[TaskOutcome, ...]:
    """Run tasks on a model, unless their scores are kept; return what became of each, in order.

    One that fails doesn't stop the others. `load` loads the model, or raises a QtoolError, if there
    is anything to run; `subject` is all of the model that decides scores: digest, dtype, device,
    backend. `add_rows` receives what was asked and answered, task by task.

    Raises:
        OutputError: rows can't be written.
    """
    found: dict[str, TaskOutcome] = {}
    missing: dict[str, KeptTask] = {}
    with Store() as store:
        for name in tasks.options.tasks:
            kept = KeptTask(_settings(name, subject, tasks), store if tasks.options.cache else None)
            scores = kept.scores()
            if scores is None:
                missing[name] = kept
                continue
            found[name] = scores
            if add_rows is not None:
                add_rows(name, kept.rows())
        if missing:
            found |= _run(missing, load, tasks, emit, add_rows)
            free_memory()  # the model is in a cycle, and would stay beside the next one
    return tuple(found[name] for name in tasks.options.tasks)


def _run(
    missing: Mapping[str, KeptTask],
    load: Callable[[], LoadedModel],
    tasks: Tasks,
    emit: Emit,
    add_rows: AddRows | None,
) -> dict[str, TaskOutcome]:
    """Run tasks whose scores aren't kept."""
    from qtool.evaluation.lm_eval.task_model import TaskModel  # lm-eval: slow

    try:
        loaded = load()
        with explained(f"lm-eval can't take {loaded.name}", full=SMALLER, other=UNFIT), quiet():
            model = TaskModel(loaded, tasks.options, emit)
    except QtoolError as error:
        return {name: _failure(name, error, emit) for name in missing}
    found: dict[str, TaskOutcome] = {}
    for name, kept in missing.items():
        try:
            found[name] = run_task(name, model, tasks, kept, add_rows)
        except OutputError:  # of the rows: the other tasks' go to the same file
            raise
        except QtoolError as error:
            found[name] = _failure(name, error, emit)
        free_memory()  # of what an error held
    return found


def run_task(
    name: str, model: "TaskModel", tasks: Tasks, kept: KeptTask, add_rows: AddRows | None
) -> TaskScores:
    """Run one task, keeping every answer as it comes.

    Raises:
        ModelError: the card is full, or the model's output isn't a number.
        DataError: lm-eval can't use the rows, or can't score the answers.
    """
    import lm_eval

    started, options = time.perf_counter(), tasks.options
    what = f"Task {name} stopped on {model.name}"
    with (
        explained(what, full=SMALLER, other=DATA),
        quiet(),
        templates_compiled_once(),
        recorded_outcomes() as outcomes,
    ):
        loaded = tasks.load_again(name)
        _set_up(loaded, tasks.shots(name), tasks)
        model.begin(name, kept.answers(model.warn))
        results = lm_eval.evaluate(
            model,
            loaded,
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
        rows = list(item_rows(results["samples"], outcomes))
        kept.finish(scores, rows, model.warn)
        if add_rows is not None:
            add_rows(name, rows)
    return scores


def _set_up(loaded: Loaded, shots: int | None, tasks: Tasks) -> None:
    """Set examples and generation as lm-eval's `simple_evaluate` does."""
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if shots is not None and fixed != 0:  # 0 means that the prompt has its examples already
            task.set_config(key="num_fewshot", value=shots)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=tasks.options.seeds[-1])
        if tasks.options.generation and writes_text(task):
            shipped = task.get_config("generation_kwargs") or {}  # maybe lm-eval's own: not edited
            given = {**shipped, **tasks.options.generation}
            task.set_config(key="generation_kwargs", value=given)


@contextlib.contextmanager
def explained(what: str, *, full: str, other: str) -> Iterator[None]:
    """Turn whatever is raised inside the block into errors that say where and what to do.

    `what` begins the message; its end is `full` if the memory is full, `other` for anything else.

    Raises:
        ModelError: the memory is full, of the card or of the host.
        DataError: anything else that isn't a QtoolError already.
    """
    try:
        yield
    except QtoolError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{what}: out of memory. {full}") from error
    except Exception as error:  # of lm-eval, jinja, metrics, torch: many unrelated types
        _LOG.debug("%s", what, exc_info=error)  # it may be a bug, and the message has one line
        said = " ".join(str(error).split()).rstrip(".") or "no reason given"
        of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        next_step = DISK if of_disk else other
        raise DataError(f"{what}, {type(error).__name__}: {said}. {next_step}") from error


def _failure(task: str, error: QtoolError, emit: Emit) -> TaskFailure:
    emit(Notice(f"{task} failed: {error}"))  # now, not when the others are done
    return TaskFailure(task=task, error=type(error).__name__, message=str(error))


def _settings(name: str, subject: Mapping[str, Any], tasks: Tasks) -> dict[str, Any]:
    """Return all that decides a task's scores."""
    options = tasks.options
    applies = bool(options.generation) and name in tasks.writing
    return {
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
