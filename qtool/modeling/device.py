"""Where models run, and in which dtype, unless something else is asked for."""

import contextlib
import gc
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from qtool.errors import BackendError

_WANTED: ContextVar[str | None] = ContextVar("qtool_device", default=None)


@contextlib.contextmanager
def use_device(name: str | None) -> Iterator[None]:
    """Make what runs inside the block run on one device.

    Args:
        name: `cpu`, `cuda`, or `cuda:1`, which is the card then that `cuda` means; None: choose.

    Raises:
        BackendError: torch has no such device here.
    """
    token = _WANTED.set(name and name.partition(":")[0])
    try:
        with _card(name):
            yield
    finally:
        _WANTED.reset(token)


def default_device() -> torch.device:
    """Return the device asked for, else a CUDA card if there is one, else the CPU."""
    return torch.device(_WANTED.get() or ("cuda" if torch.cuda.is_available() else "cpu"))


def default_dtype(device: torch.device) -> torch.dtype:
    """Return float16 on a card; float32 on a CPU, where float16 arithmetic is slow."""
    return torch.float16 if device.type == "cuda" else torch.float32


def free_memory() -> None:
    """Let go of a model that nobody names any more: it is in a cycle."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing, without a card


def room(device: torch.device) -> int:
    """Return how many bytes a model may take: what is free of a card, half of the host's memory."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def _card(name: str | None) -> contextlib.AbstractContextManager[None]:
    if name is None or torch.device(name).type == "cpu":
        return contextlib.nullcontext()
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        seen = "no CUDA card" if count == 0 else f"cuda:0 to cuda:{count - 1}"
        raise BackendError(
            f"--device is {name}, and torch {torch.__version__} sees {seen} here. Leave it out, or "
            "give cpu."
        )
    return torch.cuda.device(index)
