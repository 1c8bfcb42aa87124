"""`eval --pairs`: what models write after prompts, beside what people wrote."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.base import Emit
from qtool.modeling.device import free_memory
from qtool.modeling.load import load_model, load_tokenizer
from qtool.modeling.locate import Location
from qtool.pipeline.imported import as_ours
from qtool.pipeline.written_scores import (
    WrittenScores,
    read_questions,
    score_answers,
    write_answers,
)
from qtool.runtime.backends._choose import use_backend


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """What is written, and after what."""

    file: Path
    max_tokens: int = 128
    """Of an answer."""
    limit: int | None = None
    """The first prompts only."""


@dataclass(frozen=True, slots=True)
class ModelWritten:
    """What a model has written."""

    name: str
    scores: WrittenScores
    answers: tuple[str, ...]


def write_pairs(
    models: tuple[Location, ...],
    options: PairOptions,
    backend: str | None,
    dtype: torch.dtype | None,
    emit: Emit,
) -> tuple[ModelWritten, ...]:
    """Let models answer the prompts of a file, one model after the other.

    Raises:
        DataError: before a model is loaded: the file can't be read, or has no prompts, or a model's
            chat template refuses one.
        MissingExtraError: what scores isn't installed.
    """
    found = []
    ours = [as_ours(model, emit) for model in models]
    asked = [
        read_questions(options.file, load_tokenizer(model.directory), options.limit)
        for model in ours
    ]
    with use_backend(backend):
        for model, questions in zip(ours, asked, strict=True):
            loaded = load_model(model, dtype=dtype)
            answers, count = write_answers(loaded, questions, options.max_tokens, emit)
            scores = score_answers(answers, questions, count)
            found.append(ModelWritten(loaded.name, scores, tuple(answers)))
            del loaded
            free_memory()
    return tuple(found)
