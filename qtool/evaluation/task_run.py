"""One task of lm-eval on a loaded model: asked, answered, scored."""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from qtool.errors import DataError, ModelError, QtoolError
from qtool.evaluation.code_metric import recorded_outcomes
from qtool.evaluation.harness import Tasks, writes_text
from qtool.evaluation.item_rows import AddRows, item_rows
from qtool.evaluation.kept_scores import KeptScores
from qtool.evaluation.lm_eval_hooks import quiet, templates_compiled_once
from qtool.evaluation.local_data import Row
from qtool.evaluation.responses import ResponseStore, unkept
from qtool.evaluation.scores import TaskScores, collect_scores

if TYPE_CHECKING:
    from qtool.evaluation.task_model import TaskModel
    from qtool.evaluation.tasks import TaskOptions

_LOG = logging.getLogger(__name__)

FULL = "Give a smaller --batch-size, or a smaller --max-length."
DISK = "Answers go to $QTOOL_CACHE; --no-cache keeps none."
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
OTHER = (
    "Check the rows of its data and the packages that its metric needs; answers that are kept stay."
)


def run_task(
    name: str,
    model: "TaskModel",
    tasks: Tasks,
    options: "TaskOptions",
    kept: KeptScores,
    add_rows: AddRows | None = None,
) -> TaskScores:
    """Run one task, keeping every answer as it comes.

    Args:
        name: A requested task.
        model: It is asked.
        tasks: From `check_tasks`.
        options: The same as there.
        kept: The place of its scores.
        add_rows: Receives what was asked and answered, when the task is done.

    Raises:
        ModelError: the card is full, or the model's output isn't a number.
        DataError: lm-eval can't use the rows, or can't score the answers.
    """
    import lm_eval

    started = time.perf_counter()
    what = f"Task {name} stopped on {model.name}"
    with (
        explained(what, full=FULL, other=OTHER),
        quiet(),
        templates_compiled_once(),
        recorded_outcomes() as outcomes,
    ):
        objects = tasks.load_again(name, remember=options.cache)
        store = ResponseStore(kept.responses if options.cache else None, model.warn)
        finished = False
        try:
            model.begin(name, store)
            results = lm_eval.evaluate(
                model,
                {
                    "tasks": _prepare(objects, tasks.shots(name), options),
                    "groups": _groups(objects),
                },
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
            if options.cache:
                _keep(kept, scores, rows, model.warn)
            if add_rows is not None:
                add_rows(name, rows)
            finished = True
        finally:
            store.close(finished=finished)
    return scores


def _keep(
    kept: KeptScores, scores: TaskScores, rows: list[Row], warn: Callable[[str], None]
) -> None:
    try:
        kept.write(scores, rows)
    except OSError as error:
        warn(unkept(kept.directory, error))


@contextlib.contextmanager
def explained(what: str, *, full: str, other: str) -> Iterator[None]:
    """Turn whatever is raised inside the block into errors that say where and what to do.

    Args:
        what: Begins the message.
        full: What to do if the memory is full.
        other: What to do about anything else.

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
        reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
        of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        next_step = DISK if of_disk else other
        raise DataError(f"{what}, {type(error).__name__}: {reason}. {next_step}") from error


def _prepare(objects: Iterable[Any], shots: int | None, options: "TaskOptions") -> dict[str, Any]:
    """Set examples and generation as lm-eval's `simple_evaluate` does; returns tasks by name."""
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
        task.set_fewshot_seed(seed=options.seeds[-1])
        if options.generation and writes_text(task):
            shipped = task.get_config("generation_kwargs") or {}  # maybe lm-eval's own: not edited
            task.set_config(key="generation_kwargs", value={**shipped, **options.generation})
    return leaves


def _groups(objects: Iterable[Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for one in objects:
        if hasattr(one, "get_all_groups"):
            groups |= {group.name: group for group in [one, *one.get_all_groups()]}
    return groups
