"""What a worker does with a task, in whatever process it runs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that libraries read when they are loaded."""


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Let torch use so many threads: their number decides in which order it sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(function: Callable[[Any], Any], argument: Any) -> tuple[Any, Exception | None]:  # noqa: ANN401
    """Return what a function returns, and what it raised, of which one is None."""
    try:
        return function(argument), None
    except Exception as error:  # noqa: BLE001 - whatever it is, who asked for it is told
        error.add_note(f"in the worker {os.getpid()}")
        return None, error
