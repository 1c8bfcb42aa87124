"""`compare`: any number of checkpoints, each against the first."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from qtool.base import Emit, Notice, ignore_events
from qtool.data.corpora import load_corpus
from qtool.errors import QtoolError
from qtool.evaluation.kept import library_versions
from qtool.evaluation.lm_eval.harness import Tasks
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.modeling.config import read_config
from qtool.modeling.device import free_memory
from qtool.modeling.load import foreign_method, load_model
from qtool.modeling.locate import Location
from qtool.pipeline.evaluate import EvalOptions
from qtool.pipeline.imported import as_ours
from qtool.pipeline.model_figures import ModelFigures, figures_of, strict_bits, versions
from qtool.pipeline.model_texts import TextFigures, TextMeasure
from qtool.pipeline.scoring import score_models
from qtool.pipeline.task_results import ModelTasks, ScoreRow, score_rows
from qtool.runtime.backends._choose import use_backend
from qtool.sandbox.run import protections


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What `compare` measures."""

    texts: EvalOptions | None = field(default_factory=lambda: EvalOptions(texts=False))
    """Perplexity and closeness; None: neither."""
    tasks: TaskOptions | None = None
    """Of lm-eval; None: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """One model and all that was measured of it."""

    label: str
    """Its name; of several of one name, with a number."""
    figures: ModelFigures
    """Size and bits."""
    strict_bits: float
    """Bits on disk per value of the whole model."""
    foreign: str | None = None
    """How another tool has quantized it; None: none has."""
    texts: TextFigures | None = None
    tasks: ModelTasks | None = None
    rows: tuple[ScoreRow, ...] = ()
    """Its scores beside those of the first."""
    failure: str | None = None
    """Why its texts weren't measured, as a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsCompared:
    """Models beside the first of them."""

    models: tuple[ComparedModel, ...]
    noise: TextFigures | None = None
    """The first against itself in another batch size: what is smaller than this says nothing."""
    protections: tuple[str, ...] = ()
    """What kept programs that a model wrote from doing harm, if any ran."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Return what wasn't measured, and of which model."""
        found = [f"the texts of {one.label}" for one in self.models if one.failure is not None]
        for one in self.models:
            failed = one.tasks.failures if one.tasks is not None else ()
            found += [f"{each.task} on {one.label}" for each in failed]
        return found


def compare(
    models: Sequence[Location],
    options: CompareOptions,
    *,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    emit: Emit = ignore_events,
) -> ModelsCompared:
    """Measure models on the same texts and tasks, one in memory at a time, against the first.

    They may be originals, qtool's checkpoints, or what other tools have quantized and transformers
    loads. A model after the first that fails doesn't stop the others.

    Raises:
        QtoolError: before a model is loaded: one isn't there, a text or a task isn't; or the first
            can't be loaded or measured.
    """
    tasks = Tasks(options.tasks) if options.tasks is not None else None
    if tasks is not None:
        tasks.check()
    corpus = load_corpus(options.texts.dataset) if options.texts is not None else None
    models = [as_ours(one, emit) for one in models]
    found = _described(models)
    measure = None
    if options.texts is not None and corpus is not None:
        measure = TextMeasure(corpus, options.texts, emit)
        with use_backend(backend):
            found = [
                _measured(one, model, measure, dtype)
                for one, model in zip(found, models, strict=True)
            ]
    if tasks is not None:
        scored = score_models(models, tasks, backend, dtype, emit, foreign=True)
        found = [_scored(one, own, scored[0]) for one, own in zip(found, scored, strict=True)]
    unsafe = tasks is not None and tasks.unsafe(tasks.options.tasks)
    return ModelsCompared(
        models=tuple(found),
        noise=measure.noise if measure is not None else None,
        protections=protections() if unsafe else (),
        versions={**versions(), **(library_versions() if tasks is not None else {})},
    )


def _described(models: Sequence[Location]) -> list[ComparedModel]:
    """Return what directories say of the models, without loading one."""
    names = [one.name for one in models]
    seen: Counter[str] = Counter()
    found = []
    for name, model in zip(names, models, strict=True):
        seen[name] += 1
        found.append(
            ComparedModel(
                label=f"{name} ({seen[name]})" if names.count(name) > 1 else name,
                figures=figures_of(model, foreign=True),
                strict_bits=strict_bits(model),
                foreign=foreign_method(read_config(model.directory)),
            )
        )
    return found


def _measured(
    one: ComparedModel, model: Location, measure: TextMeasure, dtype: torch.dtype | None
) -> ComparedModel:
    """Load a model and measure its texts; what fails after the first is noted."""
    loaded = None
    try:
        loaded = load_model(model, dtype=dtype)
        return replace(one, texts=measure.measure(loaded))
    except QtoolError as error:
        if measure.references is None:
            raise
        measure.emit(Notice(f"The texts of {one.label} aren't measured: {error}"))
        return replace(one, failure=str(error))
    finally:
        del loaded
        free_memory()


def _scored(one: ComparedModel, own: ModelTasks, first: ModelTasks) -> ComparedModel:
    return replace(one, tasks=own, rows=score_rows(own, None if own is first else first))
