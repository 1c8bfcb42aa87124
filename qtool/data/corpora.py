"""Texts by name: bundled ones that work offline, a file of the user's, a data set of the hub."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qtool import resources
from qtool.base import Tokenizer
from qtool.data.documents import (
    HUB_PREFIX,
    JSONL_SUFFIXES,
    Collection,
    hub_collection,
    jsonl_collection,
)
from qtool.errors import DataError
from qtool.plugins import describe_miss
from qtool.storage.jsonl import read_text

WRITTEN_BY_THE_MODEL = "model"
"""The name of a source that is no text yet: `steps.self_written`."""
NEEDS_BOS = "gemma"
"""Part of the `model_type` of models whose predictions are useless without bos at the start."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """One running text and what to call it in results."""

    name: str
    text: str

    @property
    def origin(self) -> Mapping[str, str | None]:
        """What pins the content."""
        return {"sha256": hashlib.sha256(self.text.encode()).hexdigest()}


def bundled() -> tuple[str, ...]:
    """Return the sorted names of the bundled texts: running ones, and collections of documents."""
    return tuple(sorted(_bundled_files()))


def _bundled_files() -> Mapping[str, Path]:
    return {path.name.split(".")[0]: path for path in resources.texts_dir().glob("*.xz")}


def _found(name: str) -> tuple[Path, str]:
    """Return the file that a name means, and what to call it in results."""
    path = _bundled_files().get(name)
    return (path, name) if path is not None else (Path(name), Path(name).name)


def open_dataset(name: str) -> Corpus | Collection:
    """Return a running text or a collection of documents, whichever the name means.

    Args:
        name: As for `load_corpus`, or `hub:NAME:CONFIG:SPLIT`.

    Raises:
        DataError: there is no such text, or it can't be read.
        MissingExtraError: the library that reads it isn't installed.
    """
    if name.startswith(HUB_PREFIX):
        return hub_collection(name)
    path, shown = _found(name)
    if path.name.endswith(JSONL_SUFFIXES):
        return replace(jsonl_collection(path), name=shown)
    return load_corpus(name)


def load_corpus(name: str) -> Corpus:
    """Return a running text.

    Args:
        name: A bundled name such as `wikitext2-test`, the path of a UTF-8 `.txt` file, or that of a
            `.jsonl` or `.jsonl.gz` file whose texts are joined by empty lines.

    Raises:
        DataError: there is no such text, or it isn't UTF-8, or it isn't a running text.
    """
    if name.startswith(HUB_PREFIX):
        raise DataError(
            f"{name} is a data set of the hub, and a running text is needed here. Save the rows "
            "that you want as a .jsonl file."
        )
    path, shown = _found(name)
    if path.name.endswith(JSONL_SUFFIXES):
        return _joined(replace(jsonl_collection(path), name=shown))
    if not path.name.endswith((".txt", ".txt.xz")):
        raise DataError(
            describe_miss(name, bundled(), "bundled texts")
            + " A text of your own is given by its path, ending in .txt, .jsonl or .jsonl.gz."
        )
    return Corpus(shown, read_text(path))


def _joined(collection: Collection) -> Corpus:
    texts = []
    for document in collection.documents:
        if not isinstance(document.content, str):
            raise DataError(
                f"{document.place} is a chat, and a running text is needed here. Give lines with "
                "'text'."
            )
        if document.content.strip():
            texts.append(document.content)
    return Corpus(collection.name, "\n\n".join(texts))


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return a text as one stream of tokens, (tokens,) int64, whatever its length.

    A corpus is longer than the model's context on purpose: no truncation, no warning about it.
    """
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def check_tokens(tokens: Tensor, rows: int, name: str) -> None:
    """Refuse tokens without a row in the embedding: on a card they would end the process.

    Args:
        tokens: int64, of any shape.
        rows: Of the embedding.
        name: Of the text or the samples, for the message.

    Raises:
        DataError: a token is negative, or as large as `rows`.
    """
    if not tokens.numel():
        return
    low, high = (int(extreme) for extreme in tokens.aminmax())
    if low < 0 or high >= rows:
        raise DataError(
            f"{name} has token {low if low < 0 else high}, and the model's embedding {rows} rows: "
            "the tokenizer is another model's. Put the model's own tokenizer in its directory."
        )


def bos_warning(
    model_type: str, tokenizer: Tokenizer, pieces: Sequence[Tensor] | Tensor, name: str
) -> str | None:
    """Return what to warn of where only the first piece of a running text starts with bos.

    Args:
        model_type: Of the model's configuration.
        tokenizer: Of the model; puts bos at the start of a text.
        pieces: Windows or samples, each (length,) int64.
        name: Of the text.
    """
    bos = tokenizer.bos_token_id
    if NEEDS_BOS not in model_type or len(pieces) < 2 or int(pieces[0][0]) != bos:  # noqa: PLR2004
        return None
    without = sum(int(piece[0]) != bos for piece in pieces)
    if not without:
        return None
    return (
        f"{without} of {len(pieces)} pieces of {name} don't start with bos, because a running text "
        f"is cut in one go, and {model_type} models predict poorly without it. Compare such "
        "figures with each other only; docs/evaluation.md says more."
    )
