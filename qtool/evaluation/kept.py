"""Answers and scores of one task that an earlier run left, under a digest of all that decides them.

An interrupted evaluation goes on where it stopped; one that ended isn't run again.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pydantic import TypeAdapter

import qtool
from qtool.evaluation.scores import TaskScores
from qtool.storage.memo import Memo, added
from qtool.storage.plain_json import JsonValue, json_line
from qtool.storage.store import Store

LIBRARIES = ("torch", "transformers", "tokenizers", "lm-eval", "datasets")
OPTIONAL_LIBRARIES = ("cupy-cuda13x", "cupy-cuda12x", "triton", "numba")
"""What is installed of them decides what executes a model."""
ANSWERS, SCORES = "answers", "scores"
"""What the store calls them."""
OF_TASK, OF_ITEMS = b"task", b"items"
PACKED = 6
"""Level of gzip: prompts repeat their examples, and higher levels find little more."""
_LOG = logging.getLogger(__name__)
_SCORES = TypeAdapter(TaskScores)


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Return the versions that scores depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    for name in OPTIONAL_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"qtool": qtool.__version__, **found}


def request_key(kind: str, arguments: JsonValue) -> bytes:
    """Return what an answer is kept under: a digest of the request's kind and arguments."""
    text = json.dumps([kind, arguments], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class KeptTask:
    """The place of one task's scores, and of the answers of a run that didn't end."""

    def __init__(self, settings: Mapping[str, Any], store: Store | None) -> None:
        """Take all that decides the scores, and where they are kept; None: nowhere."""
        self.settings = {**settings, "versions": library_versions()}
        text = json.dumps(self.settings, sort_keys=True, default=str)
        self.name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self._store = store

    def answers(self, warn: Callable[[str], None]) -> Memo:
        """Return the answers that there are; `warn` is told once if none can be added."""
        return Memo(self._store, ANSWERS, self.name, warn)

    def scores(self) -> TaskScores | None:
        """Return the scores, if they are there, with their rows, and whole."""
        kept = self._store.read(SCORES, self.name) if self._store is not None else {}
        try:
            if kept.keys() == {OF_TASK, OF_ITEMS}:
                return replace(_SCORES.validate_json(kept[OF_TASK], strict=True), cached=True)
        except ValueError:  # of other types: an unfinished version of qtool
            _LOG.warning("Scores of %s are damaged and are ignored.", self.settings["task"])
        return None

    def rows(self) -> list[dict[str, Any]]:
        """Return what was asked and answered, one row per item; none without scores."""
        kept = self._store.read(SCORES, self.name, OF_ITEMS) if self._store is not None else {}
        content = gzip.decompress(kept.get(OF_ITEMS, b""))
        return [json.loads(line) for line in content.splitlines()]

    def finish(
        self, scores: TaskScores, rows: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
    ) -> None:
        """Keep scores and the rows of their items, both or neither, in place of answers."""
        packed = gzip.compress(b"\n".join(map(json_line, rows)), PACKED, mtime=0)
        kept = {OF_TASK: json_line(asdict(scores)), OF_ITEMS: packed}
        if self._store is not None and added(self._store, SCORES, self.name, kept, warn):
            with contextlib.suppress(OSError):
                self._store.remove(ANSWERS, self.name)
