"""What is learned from, read from files: exercises of decoders, texts with classes."""

from pathlib import Path
from typing import Protocol

import torch

from qtool.base import CausalModel, Emit, Progress, Tokenizer
from qtool.data.corpora import check_tokens
from qtool.data.exercises import Learned, cut_to, in_packed_rows, read_exercises, tokenized
from qtool.data.labelled import (
    Labelled,
    check_labels,
    count_classes,
    labelled_tokens,
    read_labelled,
)
from qtool.data.windows import positions_of
from qtool.errors import DataError
from qtool.modeling.load import LoadedModel
from qtool.steps.adapt_model import split_off
from qtool.training.adapting import ROUND_TO, Curriculum
from qtool.training.lessons import LabelledTexts, Lessons

TEXTS_LOOKED_AT = 128
"""Texts at once that nothing is learned from."""
HELD_OUT_SHARE, MOST_HELD_OUT, MOST_LABELLED = 0.05, 512, 2000


class Reading(Protocol):
    """How data are read."""

    @property
    def batch_size(self) -> int:
        """Texts of a step."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of a text; longer ones are cut."""
        ...

    @property
    def packing(self) -> bool:
        """Several exercises stand in a row."""
        ...

    @property
    def seed(self) -> int:
        """Of the order, and of what is held out."""
        ...


def read_curriculum(
    data: Path, validation: Path | None, loaded: LoadedModel, options: Reading, emit: Emit
) -> Curriculum:
    """Return exercises to learn from and to look at, of two files or of one.

    Raises:
        DataError: a file can't be read, or teaches nothing.
    """
    tokenizer = loaded.tokenizer
    emit(Progress(f"reading {data.name}"))
    length = _length(options, loaded.model, ROUND_TO)
    learned = _pieces(data, loaded, length)
    if validation is not None:
        held_out = _pieces(validation, loaded, length)[:MOST_HELD_OUT]
    else:
        learned, held_out = split_off(learned, HELD_OUT_SHARE, MOST_HELD_OUT, options.seed)
    filler = _filler(tokenizer)
    if options.packing:
        learned, held_out = (in_packed_rows(some, length) for some in (learned, held_out))
    return Curriculum(
        learned, held_out, options.batch_size, options.seed, filler, is_packed=options.packing
    )


def _filler(tokenizer: Tokenizer) -> int:
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in fillers if token is not None))


def _length(options: Reading, model: CausalModel, multiple: int = 1) -> int:
    """Return how many tokens a row may have: no more than the model has positions.

    Of a decoder's it is a multiple of what batches are filled up to.
    """
    limit = positions_of(model.config) or options.max_length
    return min(options.max_length, max(multiple, limit // multiple * multiple))


def _pieces(path: Path, loaded: LoadedModel, length: int) -> list[Learned]:
    exercises = read_exercises(path, loaded.tokenizer)
    whole = [tokenized(loaded.tokenizer, exercise, loaded.end) for exercise in exercises]
    pieces = cut_to(whole, length)
    if not pieces:
        raise DataError(f"{path} has nothing to learn from. Give lines as docs/adapters.md says.")
    rows = loaded.model.config.get_text_config().vocab_size
    for piece in pieces:
        check_tokens(piece.tokens, rows, path.name)
    return pieces


def read_classes(
    data: Path, validation: Path | None, num_classes: int | None, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Return texts with classes to learn from, and to look at.

    Args:
        data: Lines of JSON.
        validation: Likewise; None: some of `data` are held out.
        num_classes: That the model tells apart; None: what the data has.
        seed: Of what is held out.

    Raises:
        DataError: see `data.labelled`; or there are fewer than two lines.
    """
    rows = read_labelled(data, num_classes)
    check_labels(rows, data)
    classes = num_classes or count_classes(rows, data)
    if validation is not None:
        return rows, read_labelled(validation, classes)[:MOST_LABELLED]
    if len(rows) < 2:  # noqa: PLR2004 - one to learn from, one to look at
        raise DataError(f"{data} has 1 line; at least 2 are needed, one of them to look at.")
    count = min(MOST_LABELLED, max(1, round(HELD_OUT_SHARE * len(rows))))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[n] for n in sorted(order[count:])], [rows[n] for n in sorted(order[:count])]


def class_lessons(
    rows: tuple[list[Labelled], list[Labelled]],
    tokenizer: Tokenizer,
    model: CausalModel,
    options: Reading,
) -> Lessons:
    """Return texts with classes as lessons.

    Raises:
        DataError: the tokenizer is another model's.
    """
    length, vocabulary = _length(options, model), model.config.vocab_size
    learned, held_out = (
        LabelledTexts(
            *labelled_tokens(tokenizer, some, length, vocabulary),
            batch=options.batch_size
            if some is rows[0]
            else max(options.batch_size, TEXTS_LOOKED_AT),
            seed=options.seed,
            filler=_filler(tokenizer),
        )
        for some in rows
    )
    return Lessons(learned.of_step, held_out.in_order(), learned.steps_per_epoch)
