"""Ascending numbers in few bits (Elias and Fano): about 2 + log2(limit / count) bits each."""

import torch
from torch import Tensor

from qtool.core.packing import pack_bits, unpack_bits


def place_widths(count: int, limit: int) -> tuple[int, int]:
    """Return how `count` numbers from 0 to `limit` - 1 are cut.

    Returns:
        Low bits of each, and how many values the rest of a number may have.
    """
    low = max(0, (max(limit, 1) // max(count, 1)).bit_length() - 1)
    return low, ((max(limit, 1) - 1) >> low) + 1


def encode_places(places: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return ascending numbers as they are stored.

    Args:
        places: (count,) int64, ascending, 0 to `limit` - 1.
        limit: What they are below of.

    Returns:
        (low bits, words) int32, planes of their low bits, and (words,) int32: the rest of each in
        unary, a one per number behind as many zeros as the rest has grown.
    """
    low, highest = place_widths(len(places), limit)
    rest = places >> low
    unary = torch.zeros(len(places) + highest - 1, dtype=torch.uint8)
    unary[rest + torch.arange(len(places))] = 1
    bits = torch.stack([(places >> at) & 1 for at in reversed(range(low))]) if low else places[:0]
    lows = pack_bits(bits.to(torch.uint8)) if low else torch.zeros(0, 0, dtype=torch.int32)
    return lows, pack_bits(unary)


def decode_places(lows: Tensor, unary: Tensor, count: int, limit: int) -> Tensor:
    """Invert `encode_places`: (count,) int64; of bits that no encoder writes, any below 2 limit."""
    low, highest = place_widths(count, limit)
    ones = unpack_bits(unary, count + highest - 1).nonzero().squeeze(1)[:count]
    places = (ones - torch.arange(len(ones), device=ones.device)) << low
    for at in range(low):
        places |= unpack_bits(lows[low - 1 - at], count)[: len(ones)].long() << at
    return places
