"""`eval`: the quality of what was quantized, beside the original."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from qtool.base import Emit, Notice, ignore_events
from qtool.data.corpora import Corpus, load_corpus
from qtool.errors import QtoolError
from qtool.evaluation.closeness import (
    CHATS,
    PLAIN,
    Closeness,
    References,
    compare_closely,
    record_references,
)
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.evaluation.perplexity import PerplexityResult, perplexity
from qtool.integrations.transformers.int8_cache import keep_as_wanted
from qtool.modeling.device import free_memory
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from qtool.pipeline.card import note_evaluation
from qtool.pipeline.imported import as_ours
from qtool.pipeline.model_figures import ModelFigures, figures_of, versions
from qtool.pipeline.scoring import kv_caches, score
from qtool.pipeline.task_results import TaskComparison
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.decode.cache import use_kv_cache
from qtool.settings import KvCache

PROMPTS = 4
"""Beginnings that a model and its baseline continue."""
AGREEMENT_WINDOWS = 16
"""The most windows over which they are compared."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of a checkpoint and, measured in the same run, of its original."""

    figures: tuple[ModelFigures, ...] = ()
    """The original first, if it was measured; none where tasks were asked for."""
    closeness: Closeness = field(default_factory=Closeness)
    """How closely the checkpoint follows its original, as far as that was measured."""
    versions: dict[str, str] = field(default_factory=dict)
    tasks: TaskComparison | None = None
    """If tasks were asked for, in place of all above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What `evaluate` measures."""

    tasks: TaskOptions | None = None
    """Tasks of lm-eval; None: a text."""

    dataset: str = PLAIN
    context_length: int = 2048
    max_windows: int | None = None
    texts: bool = True
    """Also compare greedy continuations with those of the baseline."""
    chats: str | None = CHATS
    """Chats to compare on as well: bundled, or the path of a `.jsonl` file; None: none."""
    kv_cache: KvCache | None = None
    """How the model, not its baseline, keeps keys and values; None: by $QTOOL_KV_CACHE, else in
    the dtype of its activations."""

    def measure(self, model: LoadedModel, corpus: Corpus, emit: Emit) -> PerplexityResult:
        """Return the perplexity of a loaded model on the corpus of these options."""
        return perplexity(
            model,
            corpus,
            context_length=self.context_length,
            max_windows=self.max_windows,
            emit=emit,
        )

    def record(self, model: LoadedModel, corpus: Corpus, emit: Emit) -> References:
        """Return what another model is to be compared with."""
        return record_references(
            model,
            corpus,
            self.chats,
            emit,
            prompts=PROMPTS if self.texts else 0,
            context_length=self.context_length,
            max_windows=min(self.max_windows or AGREEMENT_WINDOWS, AGREEMENT_WINDOWS),
        )


def evaluate(
    model: Location,
    options: EvalOptions,
    *,
    baseline: Location | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    emit: Emit = ignore_events,
) -> Comparison:
    """Measure a model and, if given, a baseline beside it; the two are never in memory at once.

    Of a text the perplexity, and with a baseline also how closely the model follows it there and on
    chats; where that can't be said, a warning says why, and the perplexities stand. Of tasks the
    scores.

    Raises:
        QtoolError: before a model is loaded: one isn't there, or can't be executed here; or as
            `scoring.score`.
    """
    model = as_ours(model, emit)
    baseline = None if baseline is None else as_ours(baseline, emit)
    cache = kv_caches(1, options.kv_cache)[0]
    if options.tasks is None:
        result = _on_texts(model, options, baseline, backend, dtype, emit)
    else:
        with use_kv_cache(cache):
            scored = score(model, options.tasks, baseline, backend, dtype, emit)
            result = Comparison(tasks=scored)
    if cache == "auto":  # a card tells of the checkpoint as others will run it
        note_evaluation(model, result, emit)
    return result


def _on_texts(
    model: Location,
    options: EvalOptions,
    baseline: Location | None,
    backend: str | None,
    dtype: torch.dtype | None,
    emit: Emit,
) -> Comparison:
    corpus = load_corpus(options.dataset)
    subjects = {one: figures_of(one) for one in (model, baseline) if one is not None}
    models = [one for one in (baseline, model) if one is not None]
    figures: list[ModelFigures] = []
    references, close = None, Closeness()
    for one, kind in zip(models, kv_caches(len(models), options.kv_cache), strict=True):
        with use_backend(backend), use_kv_cache(kind):
            loaded = load_model(one, dtype=dtype)
            keep_as_wanted(loaded.model)
            measured = options.measure(loaded, corpus, emit)
            measured = replace(measured, kv_cache=kind)
            figures.append(replace(subjects[one], perplexity=measured))
            with _if_possible(emit):
                if len(figures) < len(models):
                    references = options.record(loaded, corpus, emit)
                elif references is not None:
                    close = compare_closely(loaded, references, emit)
            del loaded
            free_memory()
    return Comparison(tuple(figures), close, versions())


@contextmanager
def _if_possible(emit: Emit) -> Iterator[None]:
    """Warn where models can't be compared: what was measured before isn't lost to it."""
    try:
        yield
    except QtoolError as error:
        emit(Notice(f"The two models aren't compared token by token: {error}"))
