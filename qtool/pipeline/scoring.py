"""Scoring what was quantized: tasks of lm-eval, on a model and on its original."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qtool.base import Emit, ignore_events
from qtool.modeling.load import default_device, default_dtype, load_model
from qtool.modeling.locate import locate
from qtool.pipeline.measuring import ModelFigures, figures_of, versions
from qtool.runtime.select import use_backend, wanted_backend

if TYPE_CHECKING:
    import torch

    from qtool.evaluation.scores import TaskFailure, TaskScores
    from qtool.evaluation.task_comparison import ModelTasks, TaskComparison
    from qtool.evaluation.tasks import TaskOptions


def evaluate_tasks(
    model: str,
    options: "TaskOptions",
    *,
    baseline: str | None = None,
    backend: str | None = None,
    dtype: "torch.dtype | None" = None,
    emit: Emit = ignore_events,
) -> "TaskComparison":
    """Run tasks of lm-eval on a model and, if given, on a baseline: the same items, one by one.

    A task that fails is among the failures of its model; the others are run.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: before a model is loaded: a task is unknown, its data is missing, or it runs
            programs that the model writes and nobody has agreed.
        OutputError: `options.samples` can't be written.
        QtoolError: before a model is loaded: one isn't there, or its files can't be read.
    """
    from qtool.evaluation import sandbox, task_comparison
    from qtool.evaluation.item_rows import row_file
    from qtool.evaluation.kept_scores import versions as versions_of_scores
    from qtool.evaluation.tasks import check_tasks, run_tasks

    locate(model)
    tasks = check_tasks(options)
    dtype = dtype or default_dtype(default_device())
    names = [name for name in (baseline, model) if name is not None]
    subjects = [_subject(name, dtype, backend, remember=options.cache) for name in names]
    measured = []
    with use_backend(backend), row_file(options.samples) as rows_of:
        for number, (name, (figures, subject)) in enumerate(zip(names, subjects, strict=True)):
            load = partial(load_model, name, dtype=dtype)
            begin = {"model": figures.name, "baseline": number < len(names) - 1}
            add_rows = rows_of(begin) if rows_of is not None else None
            outcomes = run_tasks(load, subject, tasks, options, emit, add_rows)
            measured.append(_model_tasks(figures, outcomes))
    original = measured[0] if baseline is not None else None
    return task_comparison.TaskComparison(
        model=measured[-1],
        original=original,
        rows=task_comparison.score_rows(measured[-1], original),
        protections=sandbox.protections() if tasks.unsafe(options.tasks) else (),
        versions={**versions(), **versions_of_scores()},
    )


def _model_tasks(
    figures: ModelFigures, outcomes: "Sequence[TaskScores | TaskFailure]"
) -> "ModelTasks":
    from qtool.evaluation.scores import TaskFailure, TaskScores
    from qtool.evaluation.task_comparison import ModelTasks

    return ModelTasks(
        name=figures.name,
        weight_bytes=figures.weight_bytes,
        average_bits=figures.average_bits,
        tasks=tuple(one for one in outcomes if isinstance(one, TaskScores)),
        failures=tuple(one for one in outcomes if isinstance(one, TaskFailure)),
    )


def _subject(
    model: str, dtype: "torch.dtype", backend: str | None, *, remember: bool
) -> tuple[ModelFigures, dict[str, Any]]:
    """Return size and bits of a model, and all of it that decides scores."""
    from qtool.evaluation import kept_scores

    location = locate(model)
    name = location.public_name or location.directory.resolve().name
    return figures_of(name, location.directory), {
        "digest": kept_scores.model_digest(location.directory, remember=remember),
        "dtype": str(dtype).removeprefix("torch."),
        "device": kept_scores.device_name(default_device()),
        "backend": backend or wanted_backend(),
        "switches": kept_scores.switches(),
    }
