"""Run a function in a forked child with little time and memory, and say how it ended.

A fork of a warmed-up process starts in milliseconds, so each input gets a process of its own: what
hangs, dies of a signal or eats memory is an outcome like any other, and nothing is left behind.
"""

import faulthandler
import gc
import logging
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Never

from qtool.errors import QtoolError

SECONDS = 10
"""Of computing; three times as long if it waits, for other processes or for nobody."""
MEMORY_BYTES = 2 << 30
LONGEST_MESSAGE = 2000
"""A longer one isn't a line that anyone reads."""
PACKAGE = str(Path(__file__).parents[2] / "qtool") + os.sep


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    kind: Literal["result", "refused", "traceback", "killed"]
    text: str = ""
    """The message of a refusal; what was raised and where; the signal or the limit."""
    value: Any = None
    """What the function returned."""

    @property
    def complaint(self) -> str | None:
        """What is wrong with it; None: a result, or one line."""
        if self.kind == "result":
            return None
        if self.kind == "refused":
            if len(self.text.splitlines()) != 1:
                return f"a message that is no line: {self.text[:300]!r}"
            too_long = f"a message of {len(self.text)} characters: {self.text[:80]}"
            return too_long if len(self.text) > LONGEST_MESSAGE else None
        return self.text


def run_apart(function: Callable[..., Any], *arguments: Any, seconds: int = SECONDS) -> Outcome:
    """Call a function in a child; its result must be picklable."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that the parent has threads
        child = os.fork()
    if child == 0:
        gc.freeze()  # a collection would copy every page that it looks at
        os.close(reading)
        _work(writing, function, arguments, seconds)
    os.close(writing)
    content = _read(reading, time.monotonic() + 3 * seconds)
    os.close(reading)
    if content is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if content is None:
        return Outcome("killed", f"waits for more than {3 * seconds} s")
    if os.WIFSIGNALED(status):
        number = signal.Signals(os.WTERMSIG(status))
        hang = f"computes for more than {seconds} s"
        return Outcome("killed", hang if number == signal.SIGXCPU else number.name)
    outcome: Outcome = pickle.loads(content)
    return outcome


def _read(reading: int, deadline: float) -> bytes | None:
    """Return all that the child writes; None if it doesn't end in time."""
    pieces: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
    return None


def _work(
    writing: int, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: int
) -> Never:
    """Be the child: call, report, and end without the parent's clean-up."""
    try:
        _limit(seconds)
        outcome = _outcome(function, arguments)
        with os.fdopen(writing, "wb") as file:
            file.write(pickle.dumps(outcome))
    finally:
        os._exit(0)


def _limit(seconds: int) -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    sys.stdout = sys.stderr = os.fdopen(silence, "w")  # pytest's are no descriptors
    faulthandler.disable()  # pytest's would print the parent's stack
    logging.disable()  # handlers keep the streams that they were made with
    warnings.simplefilter("ignore")  # as for a user
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    try:
        return Outcome("result", value=function(*arguments))
    except QtoolError as error:
        return Outcome("refused", str(error))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        return Outcome("traceback", f"{type(error).__name__} in {_place(error)}: {error}"[:300])


def is_ours(error: BaseException) -> bool:
    """Return whether an error went through qtool."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.startswith(PACKAGE) for frame in frames)


def _place(error: BaseException) -> str:
    """Return the innermost function of qtool that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)] or list(frames)
    last = ours[-1]
    return f"{last.filename.removeprefix(PACKAGE)} {last.name}"
