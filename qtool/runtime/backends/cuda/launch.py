"""A kernel launch as data, so that all that decides one is tested without a card."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KernelCall(NamedTuple):
    """One launch but for its tensors: a value, so that what it takes is made once.

    The arguments of a kernel are pointers to tensors, to `zeros` if there are any, and `numbers`.
    """

    file: str
    """Of kernels/FILE.cu."""
    kernel: str
    constants: tuple[tuple[str, int], ...]
    """Macros, of `constants`."""
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    numbers: tuple[int | float, ...]
    """32-bit integers and float32."""
    zeros: int = 0
    """Words of 64 bits that are zero when the kernel starts, and that it leaves so: a stream's."""
    dependent: bool = True
    """It may start before the launch before it has ended; not if that makes the weight."""
    together: bool = False
    """All its CTAs have to run at once, as they wait for one another."""
    one_architecture: bool = False
    """It has instructions of this card's architecture that no later one has: sm_90a, not sm_90."""


Launch = Callable[[KernelCall, Sequence[Tensor | None]], None]
"""Runs a kernel on tensors, None for a null pointer; returns at once. It may start before the one
before it has ended: every kernel waits, by `wait_for_previous` of kernels/common.cuh, before it
touches what isn't a weight."""


def constants(dtype: torch.dtype, **values: int) -> tuple[tuple[str, int], ...]:
    """Return the macros of a kernel for activations of `dtype`, sorted."""
    if dtype == torch.bfloat16:
        values["ACTIVATION_BF16"] = 1
    return tuple(sorted(values.items()))


KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""Of activations that the kernels take; in others weights are dense."""

LOAD_BYTES = 16
"""What the kernels load at once."""

WARP = 32
"""Threads that run together."""

RESERVED_BYTES = 1024
"""Of shared memory, that the system takes for each block."""

WARPGROUPS = (9, 0)
"""Compute capability: the only one with `wgmma`."""

LAST_OF_BITS = (9, 0)
"""Compute capability: the last one whose tensor cores multiply bits; those from `OLDEST` on do."""

OLDEST = (8, 0)
"""Compute capability: `mma.m16n8k16` came with it."""


class Card(NamedTuple):
    """What decides a grid."""

    multiprocessors: int
    shared_bytes: int
    """Of shared memory that a block may take, at most."""
    name: str = ""
    """What `selection` knows it by."""
    warpgroups: bool = False
    """It has `wgmma`: compute capability 9.0, and no other."""
    counts_bits: bool = False
    """Its tensor cores multiply bits: compute capability 8.0 to 9.0; later ones emulate that."""
