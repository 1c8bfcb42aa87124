"""Texts by name: bundled ones that work offline, or a file of the user's."""

import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import resources
from qtool.errors import DataError
from qtool.plugins import describe_miss


@dataclass(frozen=True, slots=True)
class Corpus:
    """One text and what to call it in results."""

    name: str
    text: str


def bundled() -> tuple[str, ...]:
    """Return the sorted names of the bundled texts."""
    paths = resources.texts_dir().glob("*.txt.xz")
    return tuple(sorted(path.name.removesuffix(".txt.xz") for path in paths))


def load_corpus(name: str) -> Corpus:
    """Return a text.

    Args:
        name: A bundled name such as `wikitext2-test`, or the path of a UTF-8 `.txt` file.

    Raises:
        DataError: there is no such text, or it isn't UTF-8.
    """
    if name in bundled():
        packed = (resources.texts_dir() / f"{name}.txt.xz").read_bytes()
        return Corpus(name, lzma.decompress(packed).decode("utf-8"))
    path = Path(name)
    if path.suffix != ".txt":
        raise DataError(
            describe_miss(name, bundled(), "bundled texts")
            + " A text of your own is given by its path, ending in .txt."
        )
    try:
        return Corpus(path.name, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"No text file {path}.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}.") from error


def tokenize(tokenizer: Any, text: str) -> Tensor:  # noqa: ANN401
    """Return a text as one stream of tokens, (tokens,) int64, whatever its length.

    A corpus is longer than the model's context on purpose: no truncation, no warning about it.
    """
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
