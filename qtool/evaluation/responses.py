"""What a model has answered, kept so that an interrupted evaluation goes on where it stopped.

One JSON line per answer, appended as soon as its batch is done. Floats are written so that they
read back as they were.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qtool.wording import reason


def request_key(kind: str, arguments: Any) -> str:  # noqa: ANN401
    """Return what an answer is kept under: a digest of the request's kind and arguments."""
    text = json.dumps([kind, arguments], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_answer(kind: str, value: Any) -> bool:  # noqa: ANN401
    """Return whether a value can be the answer to a request of a kind: caches get damaged."""
    if kind == "generate_until":
        return isinstance(value, str)
    if kind == "loglikelihood_rolling":
        return type(value) in (float, int)  # the likelihood of no text is a whole 0
    return isinstance(value, tuple) and [type(part) for part in value] == [float, bool]


class ResponseStore:
    """Answers by request, in memory and, given a file, on disk.

    A file that can't be written costs what would be kept, and stops nothing.
    """

    def __init__(
        self, file: Path | None = None, warn: Callable[[str], None] = lambda _message: None
    ) -> None:
        self.file, self._warn = file, warn
        self._answers: dict[str, Any] = dict(_read(file)) if file is not None else {}
        self.found = len(self._answers)
        """Answers that an earlier run had left."""
        self._lines: IO[str] | None = None
        if file is not None:
            with self._kept_if_possible():
                file.parent.mkdir(parents=True, exist_ok=True)
                self._lines = file.open("a", encoding="utf-8", buffering=1)
                self._lines.write("\n")  # ends what a killed run may have left of its last line

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        answer = self._answers[key]
        return tuple(answer) if isinstance(answer, list) else answer

    def has(self, kind: str, key: str) -> bool:
        """Return whether there is an answer, and one to a request of this kind."""
        return key in self and is_answer(kind, self[key])

    def add(self, key: str, answer: Any) -> None:  # noqa: ANN401
        """Keep an answer: a number, a text, or a tuple of numbers."""
        self._answers[key] = answer
        if self._lines is not None:
            with self._kept_if_possible():
                self._lines.write(json.dumps([key, answer], ensure_ascii=True) + "\n")

    def close(self, *, finished: bool) -> None:
        """Close the file, and delete it if nobody will go on."""
        if self._lines is not None and self.file is not None:
            with self._kept_if_possible():
                self._lines.close()
                if finished:
                    self.file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _kept_if_possible(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._lines is not None:
                with contextlib.suppress(OSError):  # what its buffer holds can't be written either
                    self._lines.close()
            self._lines = None
            self._warn(unkept(self.file, error))


def unkept(place: Path | None, error: OSError) -> str:
    """Return what to warn of where the cache can't be written."""
    return (
        f"Answers and scores can't be kept in {place}: {reason(error)}. The run goes on, and an "
        "interrupted one would begin anew. Set QTOOL_CACHE to a folder with room."
    )


def _read(file: Path) -> Mapping[str, Any]:
    """Return the answers in a file; lines that were cut short don't count."""
    answers: dict[str, Any] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return answers
    for line in lines:
        try:
            key, answer = json.loads(line)
            answers[key] = answer
        except (ValueError, TypeError, RecursionError):
            continue
    return answers
