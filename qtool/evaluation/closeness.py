"""How closely a model follows its original: on a plain text, and on chats.

Chats have what a plain text lacks, the model's special tokens, and a model can be ruined there
alone. So both are measured, with the two models one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.base import Emit
from qtool.data.corpora import Corpus, open_dataset
from qtool.data.documents import Collection
from qtool.errors import QtoolError
from qtool.evaluation.agreement import Agreement, compare_to_reference, record_reference
from qtool.evaluation.predictions import Reference
from qtool.modeling.load import LoadedModel

PLAIN, CHATS = "wikitext2-test", "dialogues-test"
"""Bundled, and in no recipe's calibration data."""
MOST_CHAT_TOKENS = 1024
"""Of a window: chats are short, and so is what is bundled of them."""


@dataclass(frozen=True, slots=True)
class References:
    """What an original says of a text and of chats."""

    text: Reference
    chats: Reference | None
    no_chats: str | None = None
    """Why there are none, as a sentence, if chats were asked for."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """How closely a model follows its original, where that was measured."""

    text: Agreement | None = None
    chats: Agreement | None = None
    no_chats: str | None = None
    """As in `References`."""


def record_references(
    model: LoadedModel,
    text: Corpus,
    chats: str | None,
    emit: Emit,
    *,
    prompts: int = 0,
    **settings: Any,
) -> References:
    """Write down what the original says about a text and about chats.

    Args:
        model: The original.
        text: The plain one.
        chats: Name of bundled ones, or of a `.jsonl` file; None: none.
        emit: Is told of each window.
        prompts: Beginnings of the text that it continues.
        settings: As for `record_reference`; windows of chats are shorter, if need be.

    Raises:
        DataError: as `record_reference` for the text.
        ModelError: the model's output isn't a number there. What fails on chats is in `no_chats`.
    """
    of_text = record_reference(model, text, prompts=prompts, emit=emit, **settings)
    if chats is None:
        return References(of_text, None)
    if not model.tokenizer.chat_template:
        return References(of_text, None, f"{model.name} has no chat template.")
    try:
        return References(of_text, _of_chats(model, open_dataset(chats), emit, settings))
    except QtoolError as error:
        return References(of_text, None, str(error))


def compare_closely(model: LoadedModel, references: References, emit: Emit) -> Closeness:
    """Compare a model with what its original said.

    Raises:
        DataError: the vocabularies have different sizes.
        ModelError: the model's output isn't a number. What fails on chats is in `no_chats`.
    """
    text = compare_to_reference(model, references.text, emit)
    if references.chats is None:
        return Closeness(text, None, references.no_chats)
    try:
        return Closeness(text, compare_to_reference(model, references.chats, emit))
    except QtoolError as error:
        return Closeness(text, None, str(error))


def _of_chats(
    model: LoadedModel, chats: Corpus | Collection, emit: Emit, settings: Mapping[str, Any]
) -> Reference:
    length = min(settings["context_length"], MOST_CHAT_TOKENS)
    shorter = {**settings, "context_length": length}
    return record_reference(model, chats, prompts=0, emit=emit, **shorter)
