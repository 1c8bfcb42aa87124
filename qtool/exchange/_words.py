"""Numbers of few bits in 32-bit words, as peers pack them: one stream, the first number lowest.

A number may begin in one word and end in the next; with 2, 4 and 8 bits none does.
"""

import torch
from torch import Tensor

from qtool.core.packing import pack_bits, unpack_bits

NUMBERS_AT_ONCE = 2**22
"""Numbers that are packed at once: each takes a byte per bit meanwhile."""


def pack_words(numbers: Tensor, num_bits: int) -> Tensor:
    """Pack along the last dimension: (rows, n) uint8 -> (rows, ceil(n num_bits / 32)) int32."""
    shifts = torch.arange(num_bits, dtype=torch.uint8)
    rows = max(1, NUMBERS_AT_ONCE // max(numbers.shape[1], 1))
    packed = [
        pack_bits(((part.unsqueeze(-1) >> shifts) & 1).flatten(1)) for part in numbers.split(rows)
    ]
    return torch.cat(packed)


def unpack_words(words: Tensor, num_bits: int, length: int) -> Tensor:
    """Invert `pack_words`: (rows, words) int32 -> (rows, length) uint8."""
    shifts = torch.arange(num_bits, dtype=torch.uint8)
    rows = max(1, NUMBERS_AT_ONCE // max(length, 1))
    numbers = [
        (unpack_bits(part, length * num_bits).unflatten(1, (length, num_bits)) << shifts).sum(
            -1, dtype=torch.uint8
        )
        for part in words.split(rows)
    ]
    return torch.cat(numbers)


def words_for(length: int, num_bits: int) -> int:
    """Return how many words hold so many numbers."""
    return -(-length * num_bits // 32)
