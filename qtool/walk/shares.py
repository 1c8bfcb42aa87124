"""Chunks of the samples, and who has which: the chunks decide sums, and who has them doesn't."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class SharedBatches(NamedTuple):
    """The batches of a share, in order."""

    batches: tuple[Tensor, ...]
    chunks: tuple[int, ...]
    """Of the samples, the chunk that each is of."""


@dataclass(frozen=True, slots=True)
class Share:
    """One of so many equal parts of the samples."""

    number: int = 0
    count: int = 1

    def of(self, batches: Sequence[Tensor], num_chunks: int) -> SharedBatches:
        """Return the batches of this share; every so-manieth chunk, as a whole.

        Args:
            batches: All there are, each (samples, length) int64.
            num_chunks: That they are cut into.
        """
        placed = [(batch, n * num_chunks // len(batches)) for n, batch in enumerate(batches)]
        own = [each for each in placed if each[1] % self.count == self.number]
        return SharedBatches(tuple(batch for batch, _ in own), tuple(chunk for _, chunk in own))


ALL_SAMPLES = Share()
"""All samples."""
