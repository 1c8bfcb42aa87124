"""What a model has answered, kept so that an interrupted evaluation goes on where it stopped.

One JSON line per answer, appended as soon as its batch is done. Floats are written so that they
read back as they were.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def request_key(kind: str, arguments: Any) -> str:  # noqa: ANN401
    """Return what an answer is kept under: a digest of the request's kind and arguments."""
    text = json.dumps([kind, arguments], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ResponseStore:
    """Answers by request, in memory and, given a file, on disk."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._answers: dict[str, Any] = dict(_read(file)) if file is not None else {}
        self.found = len(self._answers)
        """Answers that an earlier run had left."""
        self._lines = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = file.open("a", encoding="utf-8", buffering=1)
            self._lines.write("\n")  # ends what a killed run may have left of its last line

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        answer = self._answers[key]
        return tuple(answer) if isinstance(answer, list) else answer

    def add(self, key: str, answer: Any) -> None:  # noqa: ANN401
        """Keep an answer: a number, a text, or a tuple of numbers."""
        self._answers[key] = answer
        if self._lines is not None:
            self._lines.write(json.dumps([key, answer], ensure_ascii=True) + "\n")

    def close(self, *, finished: bool) -> None:
        """Close the file, and delete it if nobody will go on."""
        if self._lines is not None and self.file is not None:
            self._lines.close()
            if finished:
                self.file.unlink(missing_ok=True)


def _read(file: Path) -> Mapping[str, Any]:
    """Return the answers in a file; lines that were cut short don't count."""
    answers: dict[str, Any] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return answers
    for line in lines:
        try:
            key, answer = json.loads(line)
            answers[key] = answer
        except (ValueError, TypeError):
            continue
    return answers
