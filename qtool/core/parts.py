"""Work that is done in parts once memory was full: samples of a batch, rows of a weight.

A part takes less at a time, and all parts together give the same result, to rounding.
"""

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's messages say; only a card's has a type of its own."""
DIMENSIONS = 3
"""Of what blocks hand on, but for Gemma 3n, which has four streams of it."""
Result = TypeVar("Result")


def memory_is_full(error: BaseException) -> bool:
    """Return whether an error says that the memory of the host or of a card is full."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def slices(total: int, count: int) -> list[slice]:
    """Return so many neighbouring parts of all, as equal as they can be."""
    edges = [total * part // count for part in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def most_parts(batch: Tensor) -> int:
    """Return in how many parts a batch (samples, length, width) of a block can be run.

    As many as it has samples; but not if they are as many as its tokens, so that what else the
    block is called with might be taken for samples; nor if it has other dimensions.
    """
    return 1 if batch.dim() != DIMENSIONS or batch.shape[0] == batch.shape[1] else len(batch)


class Parts:
    """In how many parts things are done: one, until memory was full."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Begin with whole things.

        Args:
            tell: Is told in a sentence where that changes.
        """
        self._counts: dict[str, int] = {}
        self._tell = tell

    def of(self, what: str) -> int:
        """Return in how many parts something is done."""
        return self._counts.get(what, 1)

    def begin_with(self, what: str, count: int) -> None:
        """Do something in so many parts from the start."""
        self._counts[what] = count

    def double(self, what: str, most: int) -> None:
        """Let go of what nobody needs, and do it in twice as many parts from now on."""
        gc.collect()
        torch.cuda.empty_cache()
        count = self._counts[what] = min(2 * min(self.of(what), most), most)
        self._tell(
            f"Memory was full: {what} in {count} parts from now on. The result is the same, and "
            "takes longer."
        )


def within_memory(
    parts: Parts | None, what: str, work: Callable[[int], Result], *, most: int
) -> Result:
    """Do something in as many parts as it took before; in twice as many if memory is full.

    Args:
        parts: Remembers how many; None: it is done whole, or not at all.
        what: What is done, as the beginning of a sentence: the same words, the same number.
        work: Does it in so many parts; has changed nothing if it fails.
        most: So many parts there can be at most.

    Raises:
        MemoryError, RuntimeError: memory is full even so; whatever else `work` raises.
    """
    if parts is None:
        return work(1)
    while True:
        count = min(parts.of(what), max(most, 1))
        try:
            return work(count)
        except (MemoryError, RuntimeError) as error:
            if count >= most or not memory_is_full(error):
                raise
        parts.double(what, most)  # the error is gone, and with it what its frames held
