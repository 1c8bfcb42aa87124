"""Bits <-> 32-bit words. Bit 0 of word 0 is the element of the lowest index."""

import sys

import numpy as np
import torch
from torch import Tensor

WORD_BITS = 32
if sys.byteorder != "little":  # the byte view below would swap the bits of a word
    raise ImportError("qtool packs words through their bytes and needs a little-endian machine")


def num_words(length: int) -> int:
    """Return how many 32-bit words hold `length` bits."""
    return -(-length // WORD_BITS)


def octets_of(values: Tensor) -> Tensor:
    """Return the bytes of numbers: (..., n) of k bytes each -> (..., n * k) uint8.

    A dimension of one entry may have any stride, also in what torch calls contiguous, and viewing
    as another dtype then fails: hence the new last dimension.
    """
    return values.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack zeros and ones along the last dimension; the tail of the last word is zero.

    (..., n) uint8 or bool -> (..., ceil(n / 32)) int32.
    """
    padding = num_words(bits.shape[-1]) * WORD_BITS - bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, padding))
    if not padded.is_cuda:  # numpy has it vectorized; torch would take a hundred times longer
        packed = np.packbits(padded.contiguous().numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed).view(torch.int32)
    octets = padded.unflatten(-1, (-1, 8))  # (..., bytes, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (octets << shifts).sum(-1, dtype=torch.uint8).contiguous().view(torch.int32)


def unpack_bits(words: Tensor, length: int) -> Tensor:
    """Invert `pack_bits`: (..., ceil(length / 32)) int32 -> (..., length) uint8, only 0 and 1."""
    octets = octets_of(words)
    if not octets.is_cuda and not torch.compiler.is_compiling():
        bits = np.unpackbits(octets.numpy(), axis=-1, count=length, bitorder="little")
        return torch.from_numpy(bits)
    octets = octets.unsqueeze(-1)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((octets >> shifts) & 1).flatten(-2)[..., :length]


def codes_to_planes(codes: Tensor, num_bits: int) -> Tensor:
    """Split integers into packed bit planes, the most significant bit first.

    (rows, n) uint8, 0 .. 2^num_bits - 1 -> (num_bits, rows, ceil(n / 32)) int32.
    """
    return torch.stack([pack_bits((codes >> bit) & 1) for bit in reversed(range(num_bits))])


def planes_to_codes(planes: Tensor, length: int) -> Tensor:
    """Invert `codes_to_planes`: (num_bits, rows, words) int32 -> (rows, length) uint8."""
    num_bits, rows, _ = planes.shape
    codes = torch.zeros(rows, length, dtype=torch.uint8, device=planes.device)
    for plane in range(num_bits):
        codes |= unpack_bits(planes[plane], length) << (num_bits - 1 - plane)
    return codes
