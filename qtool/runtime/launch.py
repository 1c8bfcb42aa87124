"""A kernel launch as data, so that all that decides one is tested without a card."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Zeros:
    """Memory that is zero when a kernel starts, and that it leaves as zeros: one per stream."""

    words: int
    """Of 64 bits."""


Argument = Tensor | Zeros | int | float | None
"""A pointer, a pointer to zeros, a 32-bit number, a float32, or a null pointer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One launch."""

    file: str
    """Of kernels/FILE.cu."""
    kernel: str
    constants: Mapping[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: Sequence[Argument]
    dependent: bool = True
    """It may start before the launch before it has ended; not if that makes the weight."""


Launch = Callable[[Call], None]
"""Runs a kernel; returns at once. It may start before the one before it has ended: every kernel
waits, by `wait_for_previous` of kernels/common.cuh, before it touches what isn't a weight."""


def activation_macro(dtype: torch.dtype) -> dict[str, int]:
    """Return the macro that tells a kernel the dtype of its activations: none for float16."""
    return {"ACTIVATION_BF16": 1} if dtype == torch.bfloat16 else {}


OLDEST = (8, 0)
"""Compute capability: `mma.m16n8k16` came with it."""


@dataclass(frozen=True, slots=True)
class Card:
    """What decides a grid."""

    multiprocessors: int
    shared_bytes: int
    """Of shared memory that a block may take, at most."""
    name: str = ""
    """What `selection` knows it by."""
