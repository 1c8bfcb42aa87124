"""Draw tokens from logits by temperature and nucleus (top_p), without sorting the vocabulary.

Holtzman et al., The Curious Case of Neural Text Degeneration, 2019, arXiv 1904.09751: the likeliest
tokens that together have the probability top_p; of tokens as likely as each other the first ones.
Sorting finds where they end; so does a radix search: masses are summed by the upper half of a
logit's bits, then, within the half where the nucleus ends, by the lower half. Masses are whole
numbers, so sums don't depend on their order, on the device, or on who else is in the batch. Nothing
waits for the device.
"""

import torch
from torch import Tensor
from torch.nn import functional

DIGIT_BITS, SUMMED_TOGETHER = 16, 256
MASS_BITS = 44
"""The likeliest token's mass is 2 to this; 2^18 tokens as likely don't overflow."""
BITS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def sample_nucleus(
    logits: Tensor, likeliest: Tensor, temperatures: Tensor, top_p: Tensor | None, draws: Tensor
) -> Tensor:
    """Return one token of each row, drawn by the inverse of a cumulative distribution.

    Tokens likelier than the least likely of the nucleus come first, by number; then those as likely
    as it. A row with top_p of 1 or more has all tokens, by number, whatever other rows have.

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
    masses = _masses(logits, best, temperatures)
    total = _blocked(masses).sum((1, 2))[:, None]
    if top_p is None:
        found, _ = _place(masses, _share(draws, total))
    else:
        found = _within(_descending_keys(logits), masses, total, top_p, draws)
    return found.clamp(max=logits.shape[1] - 1).squeeze(1)  # no device fails for logits of NaN


def _within(keys: Tensor, masses: Tensor, total: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
    """Return tokens (rows, 1) of the nuclei."""
    wanted = (top_p * total.double()).ceil().long().clamp(min=1).minimum(total)
    cutoff, before = _cutoff(keys, masses, wanted)
    whole = top_p >= 1
    cutoff = cutoff.masked_fill(whole, torch.iinfo(torch.int64).max)
    before = torch.where(whole, total, before)
    ties = keys == cutoff
    each = (masses * ties).amax(1, keepdim=True)  # all have the same
    end = before + -(-(wanted - before) // each.clamp(min=1)) * each
    drawn = _share(draws, end)
    is_tie = drawn >= before
    chosen = torch.where(is_tie, ties, keys < cutoff) * masses
    return _place(chosen, torch.where(is_tie, drawn - before, drawn))[0]


def _share(draws: Tensor, total: Tensor) -> Tensor:
    """Return whole numbers from 0 to below the total; the product may be rounded up to it."""
    return (draws * total.double()).long().minimum(total - 1).clamp(min=0)


def _masses(logits: Tensor, best: Tensor, temperatures: Tensor) -> Tensor:
    """Return (rows, vocab_size) int64, in proportion to probabilities."""
    exponents = (logits.double() - best.double()).div_(temperatures)
    return exponents.exp_().mul_(2.0**MASS_BITS).long()


def _descending_keys(logits: Tensor) -> Tensor:
    """Return integers of the logits' width that are smaller for likelier tokens."""
    kind = BITS_OF[logits.dtype]
    bits = (logits + 0.0).view(kind)  # -0.0 is 0.0
    sign = torch.iinfo(kind).bits - 1
    return ~(bits ^ ((bits >> sign) & torch.iinfo(kind).max))


def _cutoff(keys: Tensor, masses: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the key of the nucleus's last token, and the mass of those before it: (rows, 1)."""
    half = 2 ** (DIGIT_BITS - 1)
    upper = keys if keys.dtype == torch.int16 else keys >> DIGIT_BITS
    place, before = _place(_by_digit(upper.long() + half, masses), wanted - 1)
    first = place - half
    if keys.dtype == torch.int16:
        return first, before
    inside = masses * (upper == first)
    lower = (keys & (2**DIGIT_BITS - 1)).long()
    place, more = _place(_by_digit(lower, inside), wanted - 1 - before)
    return (first << DIGIT_BITS) | place, before + more


def _by_digit(digits: Tensor, masses: Tensor) -> Tensor:
    sums = masses.new_zeros(len(masses), 2**DIGIT_BITS)
    return sums.scatter_add_(1, digits, masses)


def _place(masses: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the sum from the left on exceeds a number, and the sum before: (rows, 1).

    Sums of blocks first: a cumulative sum of a whole row is slow on a card.
    """
    blocks = _blocked(masses)
    block, before = _place_of_few(blocks.sum(2), wanted)
    rows = torch.arange(len(masses), device=masses.device)
    within, more = _place_of_few(blocks[rows, block[:, 0]], wanted - before)
    return block * SUMMED_TOGETHER + within, before + more


def _place_of_few(masses: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    sums = masses.cumsum(1)
    place = torch.searchsorted(sums, wanted, right=True).clamp(max=masses.shape[1] - 1)
    return place, sums.gather(1, place) - masses.gather(1, place)


def _blocked(masses: Tensor) -> Tensor:
    """Return (rows, blocks, SUMMED_TOGETHER)."""
    return functional.pad(masses, (0, -masses.shape[1] % SUMMED_TOGETHER)).unflatten(
        1, (-1, SUMMED_TOGETHER)
    )
