"""Streams of weights lie one behind the other, and go with the last of them."""

import weakref

import numpy as np
import pytest

from qtool.runtime.backends.cpu.streams import HUGE_PAGE, SHELF_BYTES, STREAM_ALIGNMENT, Shelves


def test_streams_are_zeros_of_their_own_one_behind_the_other():
    shelves, end, kept = Shelves(), 0, []
    for size in (1, 64, 65, 300_000):
        stream = shelves.empty(size)
        place = stream.ctypes.data
        assert (len(stream), place % STREAM_ALIGNMENT) == (size, 0)
        assert not stream.any()
        assert not end or 0 <= place - end < STREAM_ALIGNMENT
        stream[:] = 255
        end = place + size
        kept.append(stream)
    assert kept[0].ctypes.data % HUGE_PAGE == 0


@pytest.mark.parametrize("size", [SHELF_BYTES, SHELF_BYTES + 1, 3 * SHELF_BYTES])
def test_a_stream_longer_than_what_is_left_has_a_shelf_that_holds_it(size):
    shelves = Shelves()
    first, long = shelves.empty(1), shelves.empty(size)
    assert len(long) == size
    assert not np.shares_memory(first, long)
    assert not long[[0, -1]].any()


def test_memory_goes_with_the_last_stream():
    shelves = Shelves()
    first, second = shelves.empty(10), shelves.empty(10)
    assert first.base is second.base
    shelf = weakref.ref(first.base)
    del first
    assert shelf() is not None
    del second
    assert shelf() is None
    assert len(shelves.empty(10)) == 10
