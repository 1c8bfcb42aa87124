"""Texts with a class each, as the tasks of GLUE are published: lines of JSON.

A line has `sentence`, or `sentence1` and `sentence2`, or `text`, and `label`, a whole number from 0
on; whatever else it has is left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool.base import Tokenizer
from qtool.data.corpora import check_tokens
from qtool.data.exercises import Learned
from qtool.errors import DataError
from qtool.storage.jsonl import json_lines
from qtool.wording import quoted

TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Keys of texts; the first that a line has all of."""
MOST_LABELS = 1000


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text, or two that belong together, and its class."""

    texts: tuple[str, ...]
    label: int
    place: str


def read_labelled(path: Path, num_classes: int | None = None) -> list[Labelled]:
    """Return the lines of a .jsonl file, maybe gzipped.

    Args:
        path: The file.
        num_classes: How many the model tells apart; None: it is for the file to say.

    Raises:
        DataError: it can't be read; a line lacks texts or a label, or its label isn't a class; or
            all have one label, from which nothing can be learned.
    """
    found = [_line(row, place, num_classes) for place, row in json_lines(path)]
    if not found:
        raise DataError(f"{path} has no lines. Give lines with 'sentence' and 'label'.")
    return found


def _line(row: object, place: str, num_classes: int | None) -> Labelled:
    values: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    keys = next((keys for keys in TEXTS if all(key in values for key in keys)), None)
    texts = tuple(values[key] for key in keys or ())
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{place} has no text: 'sentence', or 'sentence1' and 'sentence2', as strings that "
            "aren't empty."
        )
    label = values.get("label")
    limit = num_classes or MOST_LABELS
    if type(label) is not int or not 0 <= label < limit:
        allowed = f"a whole number from 0 to {limit - 1}"
        raise DataError(f"{place} has the label {quoted(label)}; {allowed} is meant.")
    return Labelled(texts, label, place)


def check_labels(rows: Sequence[Labelled], where: Path) -> None:
    """Check that labels differ.

    Raises:
        DataError: there is but one.
    """
    labels = {row.label for row in rows}
    if len(labels) == 1:
        raise DataError(
            f"All {len(rows)} lines of {where} have the label {labels.pop()}: nothing can be "
            "learned from them. Give lines of at least two classes."
        )


def count_classes(rows: Sequence[Labelled], where: Path) -> int:
    """Return how many classes labels tell apart, where no model says so.

    Raises:
        DataError: one of them has no line.
    """
    labels = {row.label for row in rows}
    count = max(labels) + 1
    missing = min(set(range(count)) - labels, default=None)
    if missing is not None:
        raise DataError(
            f"{where} has labels up to {count - 1}, and no line with {missing}. Number the classes "
            "from 0 on, without gaps."
        )
    return count


def labelled_tokens(
    tokenizer: Tokenizer, rows: Sequence[Labelled], length: int, vocabulary: int
) -> tuple[list[Learned], list[int]]:
    """Return tokens with a label each, and from where on each is the second of two texts.

    Longer ones are cut to `length`, the longer of two texts first.

    Raises:
        DataError: a token is beyond the model's `vocabulary`.
    """
    learned, second = [], []
    for row in rows:
        found = tokenizer(*row.texts, truncation=True, max_length=length, verbose=False)
        tokens = torch.tensor(found["input_ids"])
        check_tokens(tokens, vocabulary, row.place)
        types = list(found.get("token_type_ids") or [0] * len(tokens))
        learned.append(Learned(tokens, torch.tensor([row.label])))
        second.append(types.index(1) if 1 in types else len(types))
    return learned, second
