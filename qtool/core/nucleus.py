"""Draw tokens from logits by temperature and nucleus (top_p), without sorting the vocabulary.

Holtzman et al., The Curious Case of Neural Text Degeneration, 2019, arXiv 1904.09751: the likeliest
tokens that together have the probability top_p; of tokens as likely as each other the first ones.
Sorting finds where they end, and which of them a random number stands for; so does a search among
the sums of the tokens that have the same logit, of which 16 bits have 65,536. Those of 32 bits are
searched by their upper half, then, within it, by the lower. Masses are whole numbers, so sums don't
depend on their order, on the device, or on who else is in the batch. Nothing waits for the device.
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
    logits: Tensor, likeliest: Tensor, temperatures: Tensor, top_p: Tensor, draws: Tensor
) -> Tensor:
    """Return one token of each row, drawn by the inverse of a cumulative distribution.

    Likelier tokens come first; of tokens as likely as each other the first ones.

    Args:
        logits: (rows, vocab_size) float16, bfloat16 or float32.
        likeliest: (rows,) int64, their maxima.
        temperatures: (rows, 1) float64, above 0.
        top_p: (rows, 1) float64, above 0; from 1 on all tokens.
        draws: (rows, 1) float64 in [0, 1).

    Returns:
        (rows,) int64.
    """
    best = logits.gather(1, likeliest[:, None])
    search = (_OfWhole if logits.dtype == torch.float32 else _OfHalf)(logits, best, temperatures)
    total = search.total
    wanted = (top_p * total.double()).ceil().long().clamp(min=1).minimum(total)
    wanted = torch.where(top_p < 1, wanted, total)
    _, before, each = search.find(wanted - 1)
    end = before + -(-(wanted - before) // each) * each
    drawn = (draws * end.double()).long().minimum(end - 1)  # the product may be rounded up
    key, before, each = search.find(drawn)
    alike = (search.keys == key).view(torch.uint8)
    found, _ = _place(_Sums(alike), (drawn - before) // each)
    return found.clamp(max=logits.shape[1] - 1).squeeze(1)  # no device fails for logits of NaN


class _OfHalf:
    """Logits of 16 bits: tokens are counted by value."""

    def __init__(self, logits: Tensor, best: Tensor, temperatures: Tensor) -> None:
        self.keys = (logits + 0.0).view(torch.int16)  # -0.0 is 0.0
        self._bits, order, values, offset = _descending(logits.dtype, logits.device)
        self._masses = _masses(values, best, temperatures)
        ones = torch.ones((), dtype=torch.int32, device=logits.device).expand(logits.shape)
        counts = torch.zeros(len(logits), DIGITS, dtype=torch.int32, device=logits.device)
        counts.scatter_add_(1, self.keys + offset, ones)
        self._sums = _Sums(self._masses * counts[:, order])
        self.total = self._sums.total

    def find(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the key of the token at which masses exceed a number, and two masses.

        Of the tokens that are likelier, and of each token as likely: (rows, 1) all three.
        """
        place, before = _place(self._sums, number)
        return self._bits[place], before, self._masses.gather(1, place).clamp(min=1)


@functools.cache  # graphs read them: they are never freed
def _descending(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return all numbers of 16 bits, the largest first: bits, their places by bits, values.

    And what makes a place of bits, (1,) int64.

    NaN is the last, as if it were no token's.
    """
    with torch.inference_mode(mode=False):
        bits = torch.arange(-(DIGITS // 2), DIGITS // 2).short()
        values = bits.view(dtype).double()
        values = torch.where(values.isnan(), -torch.inf, values)
        values, order = values.sort(descending=True, stable=True)
        offset = torch.tensor([DIGITS // 2])
        return tuple(part.to(device) for part in (bits[order], order, values, offset))


class _OfWhole:
    """Logits of 32 bits: masses are added by halves of the bits."""

    def __init__(self, logits: Tensor, best: Tensor, temperatures: Tensor) -> None:
        bits = (logits + 0.0).view(torch.int32)  # -0.0 is 0.0
        self.keys = ~(bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max))  # the likeliest first
        self._upper = (self.keys >> DIGIT_BITS).long() + DIGITS // 2
        self._lower = (self.keys & (DIGITS - 1)).long()
        self._masses = _masses(logits.double(), best, temperatures)
        self._sums = _Sums(_by_digit(self._upper, self._masses))
        self.total = self._sums.total

    def find(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `_OfHalf.find` returns."""
        upper, before = _place(self._sums, number)
        inside = _by_digit(self._lower, self._masses * (self._upper == upper))
        lower, more = _place(_Sums(inside), number - before)
        key = ((upper - DIGITS // 2) << DIGIT_BITS) | lower
        each = (self._masses * (self.keys == key)).amax(1, keepdim=True)  # all have the same
        return key, before + more, each.clamp(min=1)


def _masses(logits: Tensor, best: Tensor, temperatures: Tensor) -> Tensor:
    """Return whole numbers (rows, n) int64, in proportion to probabilities."""
    exponents = (logits - best.double()).div_(temperatures)
    return exponents.exp_().mul_(2.0**MASS_BITS).long()


def _by_digit(digits: Tensor, masses: Tensor) -> Tensor:
    return masses.new_zeros(len(masses), DIGITS).scatter_add_(1, digits, masses)


class _Sums:
    """Numbers of each row, and their sums by blocks: a cumulative sum of all is slow on a card."""

    def __init__(self, numbers: Tensor) -> None:
        padded = functional.pad(numbers, (0, -numbers.shape[1] % SUMMED_TOGETHER))
        self.blocks = padded.unflatten(1, (-1, SUMMED_TOGETHER))
        self.of_blocks = self.blocks.sum(2)
        self.until = self.of_blocks.cumsum(1)
        self.total = self.until[:, -1:]
        self.rows = torch.arange(len(numbers), device=numbers.device)


def _place(sums: _Sums, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the sum from the left on exceeds a number, and the sum before: (rows, 1)."""
    block, before = _place_of_few(sums.of_blocks, sums.until, wanted)
    few = sums.blocks[sums.rows, block[:, 0]]
    within, more = _place_of_few(few, few.cumsum(1), wanted - before)
    return block * SUMMED_TOGETHER + within, before + more


def _place_of_few(numbers: Tensor, until: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.searchsorted(until, wanted, right=True).clamp(max=numbers.shape[1] - 1)
    return place, until.gather(1, place) - numbers.gather(1, place)
