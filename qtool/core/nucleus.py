"""Draw tokens from logits by temperature and nucleus (top_p), without sorting the vocabulary.

Holtzman et al., The Curious Case of Neural Text Degeneration, 2019, arXiv 1904.09751: the likeliest
tokens that together have the probability top_p; of tokens as likely as each other the first ones.
Sorting finds where they end; so does a search among sums of masses by the logits' bits. Logits of
16 bits have 65,536 values, of which tokens are counted; those of 32 bits are searched by their
upper half, then, within the half where the nucleus ends, by the lower. Masses are whole numbers, so
sums don't depend on their order, on the device, or on who else is in the batch. Nothing waits for
the device.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

DIGIT_BITS, SUMMED_TOGETHER = 16, 256
DIGITS = 2**DIGIT_BITS
MASS_BITS = 44
"""The likeliest token's mass is 2 to this; 2^18 tokens as likely don't overflow."""


def sample_nucleus(
    logits: Tensor, likeliest: Tensor, temperatures: Tensor, top_p: Tensor | None, draws: Tensor
) -> Tensor:
    """Return one token of each row, drawn by the inverse of a cumulative distribution.

    Of 16 bits, likelier tokens come first, then the first ones. Of 32 bits, those likelier than the
    least likely of the nucleus come first, by number, then those as likely as it; where top_p is 1
    or more all are in one row, by number. Other rows change nothing in either.

    Args:
        logits: (rows, vocab_size) float16, bfloat16 or float32.
        likeliest: (rows,) int64, their maxima.
        temperatures: (rows, 1) float64, above 0.
        top_p: (rows, 1) float64; None: all 1.
        draws: (rows, 1) float64 in [0, 1).

    Returns:
        (rows,) int64.
    """
    best = logits.gather(1, likeliest[:, None])
    logits = logits + 0.0  # -0.0 is 0.0
    if logits.dtype == torch.float32:
        return _by_halves(logits, _masses(logits.double(), best, temperatures), top_p, draws)
    search = _Values(logits, best, temperatures)
    end = search.total
    if top_p is not None:
        _, _, end = search.find(_wanted(top_p, search.total) - 1)
    key, rank, _ = search.find(_share(draws, end))
    return _place(_Sums((search.keys == key).view(torch.uint8)), rank)[0].squeeze(1)


def _wanted(top_p: Tensor, total: Tensor) -> Tensor:
    """Return the mass that a nucleus has at least."""
    wanted = (top_p * total.double()).ceil().long().clamp(min=1).minimum(total)
    return torch.where(top_p < 1, wanted, total)


def _share(draws: Tensor, total: Tensor) -> Tensor:
    """Return whole numbers from 0 to below the total; the product may be rounded up to it."""
    return (draws * total.double()).long().minimum(total - 1)


def _masses(logits: Tensor, best: Tensor, temperatures: Tensor) -> Tensor:
    """Return whole numbers (rows, n) int64, in proportion to probabilities.

    The best have the greatest mass also where they are infinite or NaN, so no device fails.
    """
    exponents = (logits - best.double()).div_(temperatures).nan_to_num_(nan=0.0)
    return exponents.exp_().mul_(2.0**MASS_BITS).long()


class _Values:
    """Logits of 16 bits: tokens are counted by value."""

    def __init__(self, logits: Tensor, best: Tensor, temperatures: Tensor) -> None:
        self.keys = logits.view(torch.int16)
        self._bits, order, values, offset = _descending(logits.dtype, logits.device)
        self._masses = _masses(values, best, temperatures)
        ones = torch.ones((), dtype=torch.int32, device=logits.device).expand(logits.shape)
        counts = torch.zeros(len(logits), DIGITS, dtype=torch.int32, device=logits.device)
        counts.scatter_add_(1, self.keys + offset, ones)
        self._sums = _Sums(self._masses * counts[:, order])
        self.total = self._sums.total

    def find(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return at which token the sum of masses exceeds a number: (rows, 1) all three.

        Its key, how many as likely are before it, and the sum with it.
        """
        place, before = _place(self._sums, number)
        return self._bits[place], *_among(self._masses.gather(1, place), before, number)


def _among(each: Tensor, before: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of equal masses come before a number, and the sum with the next."""
    rank = (number - before) // each
    return rank, before + (rank + 1) * each


@functools.cache  # graphs read them: they are never freed
def _descending(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return all numbers of 16 bits, the largest first: bits, their places by bits, values.

    NaN is the last, as if it were no token's. And what makes a place of bits, (1,) int64.
    """
    with torch.inference_mode(mode=False):
        bits = torch.arange(-(DIGITS // 2), DIGITS // 2).short()
        values = bits.view(dtype).double()
        values = torch.where(values.isnan(), -torch.inf, values)
        values, order = values.sort(descending=True, stable=True)
        offset = torch.tensor([DIGITS // 2])
        return tuple(part.to(device) for part in (bits[order], order, values, offset))


def _by_halves(logits: Tensor, masses: Tensor, top_p: Tensor | None, draws: Tensor) -> Tensor:
    """Return tokens (rows,) of logits of 32 bits."""
    every = _Sums(masses)
    if top_p is None:
        return _place(every, _share(draws, every.total))[0].squeeze(1)
    bits = logits.view(torch.int32)
    keys = ~(bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max))  # the likeliest first
    wanted = _wanted(top_p, every.total)
    cutoff, before = _cutoff(keys, masses, wanted)
    cutoff = cutoff.masked_fill(top_p >= 1, torch.iinfo(torch.int64).max)
    before = torch.where(top_p < 1, before, every.total)
    ties = keys == cutoff
    each = (masses * ties).amax(1, keepdim=True).clamp(min=1)  # all have the same
    end = before + -(-(wanted - before) // each) * each
    drawn = _share(draws, end)
    is_tie = drawn >= before
    chosen = torch.where(is_tie, ties, keys < cutoff) * masses
    return _place(_Sums(chosen), torch.where(is_tie, drawn - before, drawn))[0].squeeze(1)


def _cutoff(keys: Tensor, masses: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the key of the nucleus's last token, and the mass of those before it: (rows, 1)."""
    upper = keys >> DIGIT_BITS
    place, before = _place(_Sums(_by_digit(upper.long() + DIGITS // 2, masses)), wanted - 1)
    first = place - DIGITS // 2
    inside = masses * (upper == first)
    lower = (keys & (DIGITS - 1)).long()
    place, more = _place(_Sums(_by_digit(lower, inside)), wanted - 1 - before)
    return (first << DIGIT_BITS) | place, before + more


def _by_digit(digits: Tensor, masses: Tensor) -> Tensor:
    return masses.new_zeros(len(masses), DIGITS).scatter_add_(1, digits, masses)


class _Sums:
    """Numbers of each row, and their sums by blocks: a cumulative sum of all is slow on a card."""

    def __init__(self, numbers: Tensor) -> None:
        short = -numbers.shape[1] % SUMMED_TOGETHER
        padded = functional.pad(numbers, (0, short)) if short else numbers
        self.blocks = padded.unflatten(1, (-1, SUMMED_TOGETHER))
        of_blocks = self.blocks.sum(2)
        self.until = of_blocks.cumsum(1)
        self.before = self.until - of_blocks
        self.total = self.until[:, -1:]


def _place(sums: _Sums, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the sum from the left on exceeds a number, and the sum before: (rows, 1).

    The number is from 0 to below the total.
    """
    block = torch.searchsorted(sums.until, wanted, right=True)
    before = sums.before.gather(1, block)
    few = sums.blocks.gather(1, block[:, :, None].expand(-1, -1, SUMMED_TOGETHER)).squeeze(1)
    until = few.cumsum(1)
    within = torch.searchsorted(until, wanted - before, right=True)
    more = (until - few).gather(1, within)
    return block * SUMMED_TOGETHER + within, before + more
