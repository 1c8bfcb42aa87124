"""What is done in parts once memory was full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.parts import Parts, memory_is_full, most_parts, slices, within_memory

ON_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
FULL = [MemoryError(), RuntimeError(ON_CPU), torch.OutOfMemoryError("CUDA out of memory.")]


def fails_below(parts: int, error: BaseException):
    """Return work that has room for what is done in so many parts."""

    def work(count: int) -> int:
        if count < parts:
            raise error
        return count

    return work


@pytest.mark.parametrize("error", FULL)
def test_parts_double_until_there_is_room_and_stay(error):
    told: list[str] = []
    parts = Parts(told.append)
    assert within_memory(parts, "things are done", fails_below(4, error), most=8) == 4
    assert [sentence.split(" in ")[1][:7] for sentence in told] == ["2 parts", "4 parts"]
    assert told[0].startswith("Memory was full: things are done in 2 parts")
    assert within_memory(parts, "things are done", fails_below(1, error), most=8) == 4
    assert within_memory(parts, "things are done", fails_below(1, error), most=3) == 3
    assert within_memory(parts, "others are done", fails_below(1, error), most=8) == 1
    assert len(told) == 2


@pytest.mark.parametrize("error", FULL)
def test_what_has_no_smaller_parts_is_an_error(error):
    parts = Parts(lambda _: None)
    with pytest.raises(type(error)):
        within_memory(parts, "things are done", fails_below(6, error), most=5)
    assert parts.of("things are done") == 5
    with pytest.raises(type(error)):
        within_memory(None, "things are done", fails_below(2, error), most=5)


def test_other_errors_are_not_answered():
    told: list[str] = []
    with pytest.raises(RuntimeError, match="shapes"):
        error = RuntimeError("shapes differ")
        within_memory(Parts(told.append), "things are done", fails_below(2, error), most=5)
    assert not told
    assert not memory_is_full(ValueError("out of memory"))


@given(st.integers(1, 50), st.data())
def test_slices_are_all_of_it_and_nearly_equal(total, data):
    count = data.draw(st.integers(1, total))
    found = [list(range(total))[part] for part in slices(total, count)]
    assert [place for part in found for place in part] == list(range(total))
    assert len(found) == count
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_samples_as_many_as_tokens_are_not_told_apart():
    assert most_parts(torch.zeros(3, 5, 2)) == 3
    assert most_parts(torch.zeros(5, 5, 2)) == 1
