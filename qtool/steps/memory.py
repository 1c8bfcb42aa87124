"""How much memory the process has used, and what it means that there is too little."""

import ctypes
import errno
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qtool.checkpoint.place import describe
from qtool.core.parts import memory_is_full
from qtool.errors import FULL, BackendError, OutputError
from qtool.wording import reason


def peak_memory(device: str) -> int:
    """Return the peak in bytes: of the card if `device` is one, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_memory() -> None:
    """Give what was freed back to the system, where the C library (glibc) can.

    After many blocks it keeps hundreds of megabytes, on top of which the next models would lie.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def failures_of_the_machine(device: str, out_dir: Path) -> Iterator[None]:
    """Turn too little memory, and failures of the file system, into one line.

    Raises:
        BackendError: a card or the host has too little memory.
        OutputError: a file can't be read or written.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_card = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
        if not memory_is_full(error):
            raise
        where = f"The memory of {device}" if on_card else "The memory of this machine"
        raise BackendError(
            f"{where} is full. End other programs that use it, or choose a larger one; shorter "
            "samples (calibration.sequence_length) need less of it."
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise describe(error, out_dir) from error
        if error.errno == errno.ENOMEM:
            raise BackendError("The memory of this machine is full. End other programs.") from error
        where = error.filename or "A file of this run"
        raise OutputError(f"{where} can't be read or written: {reason(error)}.") from error
