"""How many requests of a task a model answers at once, where nobody says it.

Decided by what is asked and the size of the card, never by what happens to be free: the last digits
of scores depend on batches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

MOST_READ = 64
"""Requests that a card reads at once: with more, a large model gains nothing."""
MOST_WRITTEN = 16
"""Texts that it writes at once: as many tokens as one pass of the bit-plane kernel takes."""
MOST_ON_CPU = 8
"""Of either: with more a CPU isn't faster."""
LOGIT_BYTES = 2**31
"""Of the logits of a batch, at most: lm-eval wants those of every token."""
LOGIT_SHARE, CACHE_SHARE = 16, 8
"""Logits take one of so many parts of a card, keys and values another: both lie beside a model that
may fill half of it, logits twice."""


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a card; None: it isn't one."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def tokens_read_at_once(logit_bytes: int, memory: int | None) -> int:
    """Return how many tokens of `logit_bytes` each, padding included, a batch may have."""
    room = LOGIT_BYTES if memory is None else min(LOGIT_BYTES, memory // LOGIT_SHARE)
    return room // logit_bytes


def written_at_once(cache_bytes: int, longest: int, memory: int | None) -> int:
    """Return how many texts, the longest of `longest` tokens with its prompt, are written at once.

    `cache_bytes` is the size of the keys and values of one token, of all beams.
    """
    if memory is None:
        return MOST_ON_CPU
    room = memory // CACHE_SHARE // max(1, cache_bytes * longest)
    return max(1, min(MOST_WRITTEN, room))


def batches_by_length(
    most: int, tokens: int, length: Callable[[Any], int]
) -> Callable[[int, Sequence[Any]], int]:
    """Return what sizes the batches of requests that come longest first, as lm-eval orders them.

    A batch is padded to its first request, and has `most` requests and `tokens`; `length` gives
    those of a request. What is returned is asked for every position in turn, from 0 on, and gives
    the size of the batch that holds the request there.
    """
    end = size = 0

    def size_of(position: int, requests: Sequence[Any]) -> int:
        nonlocal end, size
        if position in (0, end):
            size = max(1, min(most, tokens // max(1, length(requests[position]))))
            end = position + size
        return size

    return size_of
