"""Rows of a weight solved side by side: a thread for each part of them.

Solvers walk over columns, in steps that are too small for the threads that torch gives to one
operation. A row is a problem of its own, so that parts of the rows keep a core busy each; torch
lets go of the interpreter's lock while it computes. docs/log.md has what that is worth.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

MOST_IN_THREADS = 2**22
"""Steps of a larger weight keep torch's own threads busy; nor would a stop wait for long parts."""
MOST_PARTS = 4
"""With more threads the interpreter, which one of them has at a time, is what they wait for."""
FEWEST_IN_A_PART = 384
"""Fewer gain nothing: an operation is over before another thread gets the interpreter."""
ALIGNED_ROWS = 16
"""Parts begin at multiples of a vector's length, so that products have the bits of the whole."""


def num_parts(weight: Tensor) -> int:
    """Return in how many parts the rows of a weight (rows, columns) are solved; one on a card."""
    if weight.device.type != "cpu" or weight.numel() > MOST_IN_THREADS:
        return 1
    return max(1, min(torch.get_num_threads(), MOST_PARTS, len(weight) // FEWEST_IN_A_PART))


def by_rows(
    work: Callable[..., tuple[Tensor, ...]], weight: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Do something with parts of the rows of a weight at the same time, each in a thread.

    An error of one part, and a stop, arrive once all parts have come to an end.

    Args:
        work: Takes (rows of the part, columns) and as many rows of the others, and gives tensors
            with as many rows; changes nothing that parts share.
        weight: (rows, columns).
        others: (rows, ...).

    Returns:
        What `work` gives, (rows, ...).

    Raises:
        Exception: what `work` raises, for the first part that fails.
    """
    count, threads = num_parts(weight), torch.get_num_threads()
    if count == 1:
        return work(weight, *others)
    size = -(-len(weight) // (count * ALIGNED_ROWS)) * ALIGNED_ROWS
    parts = [each.split(size) for each in (weight, *others)]
    each_has = (threads // count,)
    try:
        with ThreadPoolExecutor(count, "rows", torch.set_num_threads, each_has) as pool:
            found = list(pool.map(work, *parts))
    finally:
        torch.set_num_threads(threads)  # also of threads that begin later
    return tuple(torch.cat(tensors) for tensors in zip(*found, strict=True))
