"""Where streams of weights lie: one behind the other, as they are made, in huge pages."""

import threading
import weakref
from typing import Any

import numpy as np

from qtool.runtime.host_memory import advise_huge_pages

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
STREAM_ALIGNMENT, HUGE_PAGE = 64, 2**21
SHELF_BYTES = 2**26
"""Of the address space that is asked for at once; memory is what is written to."""


class Shelves:
    """Hands out places for streams; a shelf goes with the last of its streams.

    A decoding step reads weights in the order in which a model's modules are made. Short streams
    share huge pages this way, and a processor that reads ahead of one finds the next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shelf: weakref.ref[Bytes] | None = None  # nobody's memory stays for it
        self._used = 0

    def empty(self, num_bytes: int) -> Bytes:
        """Return zeros (num_bytes,) uint8, aligned to 64, in huge pages where there are any."""
        with self._lock:
            shelf = self._shelf() if self._shelf is not None else None
            if shelf is None or self._used + num_bytes > len(shelf):
                shelf = _new_shelf(num_bytes)
                self._shelf, self._used = weakref.ref(shelf), -shelf.ctypes.data % HUGE_PAGE
            stream = shelf[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // STREAM_ALIGNMENT) * STREAM_ALIGNMENT
        return stream


def _new_shelf(num_bytes: int) -> Bytes:
    """Return zeros whose pages aren't there before they are used."""
    size = max(SHELF_BYTES, -(-num_bytes // HUGE_PAGE) * HUGE_PAGE)
    shelf = np.zeros(size + HUGE_PAGE, np.uint8)
    advise_huge_pages(shelf.ctypes.data, len(shelf))
    return shelf


STREAMS = Shelves()
