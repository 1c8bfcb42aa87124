"""Scoring what was quantized: tasks of lm-eval, on a model and on its original."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qtool import settings as environment
from qtool.base import Emit
from qtool.checkpoint.adapter_files import adapter_digest
from qtool.errors import ModelError
from qtool.evaluation.kept import library_versions
from qtool.evaluation.lm_eval.harness import Tasks
from qtool.evaluation.lm_eval.hooks import quiet
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.evaluation.lm_eval.run import explained, run_tasks
from qtool.evaluation.scores import TaskFailure, TaskScores
from qtool.integrations.transformers.int8_cache import keep_as_wanted
from qtool.modeling.device import default_device, default_dtype
from qtool.modeling.digest import model_digest, model_states
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from qtool.pipeline.model_figures import ModelFigures, figures_of, versions
from qtool.pipeline.sample_file import row_file
from qtool.pipeline.task_results import ModelTasks, TaskComparison, score_rows
from qtool.runtime.backends._choose import use_backend, wanted_backend
from qtool.runtime.decode.cache import use_kv_cache, wanted_kv_cache
from qtool.sandbox.run import protections
from qtool.settings import KvCache
from qtool.wording import reason

TOO_LARGE = "It needs a larger card, or fewer bytes for each weight."
DAMAGED = "Check that its files are whole."


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model that is evaluated."""

    location: Location
    figures: ModelFigures
    settings: Mapping[str, Any]
    """All of it that decides scores."""
    states: Mapping[str, tuple[int, ...]]
    """Of its files, as they were when their digest was taken."""


def score(
    model: Location,
    options: TaskOptions,
    baseline: Location | None,
    backend: str | None,
    dtype: torch.dtype | None,
    emit: Emit,
) -> TaskComparison:
    """Run tasks of lm-eval on a model and, if given, on a baseline: the same items, one by one.

    A task that fails is among the failures of its model; the others are run.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: before a model is loaded: a task is unknown, its data is missing, or it runs
            programs that the model writes and nobody has agreed.
        OutputError: `options.samples` can't be written.
        ModelError: before a model is loaded: one isn't there, or its files can't be read.
        CheckpointError: before a model is loaded: one is damaged.
    """
    tasks = Tasks(options)
    tasks.check()
    models = [one for one in (baseline, model) if one is not None]
    *others, measured = score_models(models, tasks, backend, dtype, emit)
    original = others[0] if others else None
    return TaskComparison(
        model=measured,
        original=original,
        rows=score_rows(measured, original),
        protections=protections() if tasks.unsafe(options.tasks) else (),
        versions={**versions(), **library_versions()},
    )


def score_models(
    models: Sequence[Location],
    tasks: Tasks,
    backend: str | None,
    dtype: torch.dtype | None,
    emit: Emit,
    *,
    foreign: bool = False,
) -> list[ModelTasks]:
    """Run tasks of lm-eval on models, one after the other; of several the first is the baseline.

    Args:
        models: Where they are.
        tasks: Checked ones.
        backend: Of quantized layers; None: by choice.
        dtype: None: by device.
        emit: Is told of all.
        foreign: As for `figures_of`.

    Raises:
        OutputError, ModelError, CheckpointError: as `score`.
    """
    options, dtype = tasks.options, dtype or default_dtype(default_device())
    caches = kv_caches(len(models))
    subjects = [
        _subject(one, dtype, backend, kv_cache=cache, remember=options.cache, foreign=foreign)
        for one, cache in zip(models, caches, strict=True)
    ]
    measured = []
    with use_backend(backend), row_file(options.samples) as rows_of:
        for number, subject in enumerate(subjects):
            load = partial(_load, subject, dtype, remember=options.cache)
            begin = {"model": subject.figures.name, "baseline": number == 0 < len(models) - 1}
            add_rows = rows_of(begin) if rows_of is not None else None
            with use_kv_cache(caches[number]):
                outcomes = run_tasks(load, subject.settings, tasks, emit, add_rows)
            measured.append(_model_tasks(subject.figures, outcomes))
    return measured


def kv_caches(models: int, kind: KvCache | None = None) -> list[KvCache]:
    """Return how each of several models keeps keys and values: the first, a baseline, as ever."""
    wanted = kind or wanted_kv_cache()
    return ["auto" if number == 0 < models - 1 else wanted for number in range(models)]


def _model_tasks(figures: ModelFigures, outcomes: Sequence[TaskScores | TaskFailure]) -> ModelTasks:
    return ModelTasks(
        name=figures.name,
        weight_bytes=figures.weight_bytes,
        average_bits=figures.average_bits,
        tasks=tuple(one for one in outcomes if isinstance(one, TaskScores)),
        failures=tuple(one for one in outcomes if isinstance(one, TaskFailure)),
    )


def _subject(
    location: Location,
    dtype: torch.dtype,
    backend: str | None,
    *,
    kv_cache: KvCache,
    remember: bool,
    foreign: bool,
) -> _Subject:
    name = location.name
    try:
        states = model_states(location.directory)
        figures = figures_of(location, foreign=foreign)
        digest = model_digest(location.directory, remember=remember)
    except OSError as error:
        raise ModelError(
            f"Can't read {error.filename} of {name}: {reason(error)}. Check that the model's "
            "files are all there, and yours to read."
        ) from error
    device = default_device()
    of_adapter = {} if location.adapter is None else {"adapter": adapter_digest(location.adapter)}
    settings = {
        **of_adapter,
        "digest": digest,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": backend or wanted_backend(),
        "switches": _switches(kv_cache),
    }
    return _Subject(location, figures, settings, states)


def _switches(kv_cache: KvCache) -> dict[str, str]:
    """Return the switches that a model runs under: an option counts as the switch it stands for."""
    given = environment.given(environment.EXECUTION)
    given.pop("QTOOL_KV_CACHE", None)
    return given if kv_cache == "auto" else {**given, "QTOOL_KV_CACHE": kv_cache}


def _load(subject: _Subject, dtype: torch.dtype, *, remember: bool) -> LoadedModel:
    """Load a model, which may be hours after its digest was taken."""
    name, directory = subject.figures.name, subject.location.directory
    with explained(f"{name} can't be loaded", full=TOO_LARGE, other=DAMAGED), quiet():
        loaded = load_model(subject.location, dtype=dtype)
        keep_as_wanted(loaded.model)
        same = model_states(directory) == subject.states or (
            model_digest(directory, remember=remember) == subject.settings["digest"]
        )
    if not same:
        raise ModelError(
            f"The files of {name} have changed since this run began. The same command again "
            "evaluates it as it is now."
        )
    return loaded
