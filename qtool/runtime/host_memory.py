"""Advice to the system on memory of the host: pages in which parts wait, pages of streams."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

PAGE_STATES = Path("/proc/self/pagemap")
OF_FILE, SOMEWHERE = np.uint64(1 << 61), np.uint64(3 << 62)
"""A page's state says that a file has it; that it is in memory or swapped out."""
HUGE_PAGES, NOT_NEEDED = 14, 4
"""MADV_HUGEPAGE and MADV_DONTNEED of Linux."""


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Ask for huge pages in a range of addresses, where the system has any."""
    _advise(*_whole_pages(address, num_bytes), HUGE_PAGES)


def let_go_of_pages(tensors: Iterable[Tensor]) -> None:
    """Let tensors that are mapped from a file wait there; who reads them brings their pages back.

    A tensor that was written to isn't what its file has, so it stays where it is.
    """
    for tensor in tensors:
        first, num_bytes = _whole_pages(tensor.data_ptr(), tensor.nbytes)
        if tensor.device.type == "cpu" and num_bytes > 0 and _is_of_file(first, num_bytes):
            _advise(first, num_bytes, NOT_NEEDED)


def _whole_pages(address: int, num_bytes: int) -> tuple[int, int]:
    """Return the address and the bytes of the whole pages in a range."""
    first = address + -address % mmap.PAGESIZE
    return first, (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first


def _is_of_file(address: int, num_bytes: int) -> bool:
    """Return whether all pages of a range that are anywhere are as a file has them."""
    try:
        with PAGE_STATES.open("rb", buffering=0) as file:
            file.seek(address // mmap.PAGESIZE * 8)
            states = np.frombuffer(file.read(num_bytes // mmap.PAGESIZE * 8), np.uint64)
    except OSError:
        return False
    if len(states) * mmap.PAGESIZE != num_bytes:
        return False
    return bool(((states & OF_FILE != 0) | (states & SOMEWHERE == 0)).all())


def _advise(address: int, num_bytes: int, advice: int) -> None:
    call = _madvise()
    if call is not None and num_bytes > 0:
        call(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice)


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    """Return madvise, where the system is Linux."""
    try:
        return ctypes.CDLL(None).madvise if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None
