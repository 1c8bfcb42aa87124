"""The cached block inputs: what the original and the quantized model carry from block to block."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import OutputError
from qtool.walk.filled_block import Block
from qtool.wording import reason

ZEROS = 2**24


@dataclass(frozen=True, slots=True)
class Streams:
    """Inputs of the next block, batch by batch, off the card; overwritten block by block."""

    original: tuple[Tensor, ...]  # each (samples, length, width), of the original model
    quantized: tuple[Tensor, ...]  # the same in the quantized model
    num_train: int
    """Batches from this one on are held out."""
    chunks: tuple[int, ...] = ()
    """Of the samples, which one each batch is of; empty: there is one."""

    def chunk_of(self, batch: int) -> int:
        """Return of which chunk of the samples a batch is."""
        return self.chunks[batch] if self.chunks else 0

    def advance(self, original: Block, quantized: Block) -> None:
        """Replace all block inputs by the block's outputs."""
        both = [(original, self.original), (quantized, self.quantized)]
        for block, batches in both[: 1 if self.are_one else 2]:
            for index, batch in enumerate(batches):
                batch.copy_(block.run(batch, index), non_blocking=True)
        if self.original[0].is_pinned():
            torch.cuda.synchronize()

    @property
    def are_one(self) -> bool:
        """Whether the quantized model is taken to carry what the original does."""
        return self.quantized is self.original


@dataclass(frozen=True, slots=True)
class Visit:
    """A block where the walk stands."""

    original: Block
    """With its original weights."""
    quantized: Block
    """As far as it is quantized."""
    streams: Streams
    """Its inputs."""
    chunk: int | None = None
    """Of the samples, the only one that is looked at; None: all are."""


def make_streams(
    hidden: Sequence[Tensor],
    num_train: int,
    *,
    device: str,
    directory: Path | None,
    as_one: bool = False,
) -> Streams:
    """Copy the inputs of the first block into buffers for both models.

    Args:
        hidden: Inputs of the first block, each (samples, length, width), on the CPU.
        num_train: How many of them are not held out.
        device: Where blocks run. For a card the buffers are page-locked: copies to and from them
            are several times faster, and don't make the CPU wait.
        directory: Keep the buffers in two files there, mapped into memory; None: in memory.
        as_one: The quantized model carries what the original does.

    Raises:
        OutputError: the disk has no room for them.
    """
    if not hidden:
        return Streams((), (), 0)
    pinned = device.startswith("cuda") and directory is None
    both = []
    for name in ("original", "quantized")[: 1 if as_one else 2]:
        total = sum(batch.numel() for batch in hidden)
        if directory is not None:
            path = directory / f"{name}.stream"
            _allocate(path, total * hidden[0].element_size())
            buffer = torch.from_file(str(path), shared=True, size=total, dtype=hidden[0].dtype)
        else:
            buffer = torch.empty(total, dtype=hidden[0].dtype, pin_memory=pinned)
        parts = buffer.split([prod(batch.shape) for batch in hidden])
        views = tuple(part.view(batch.shape) for part, batch in zip(parts, hidden, strict=True))
        for view, batch in zip(views, hidden, strict=True):
            view.copy_(batch)
        both.append(views)
    return Streams(both[0], both[-1], num_train)


def _allocate(path: Path, num_bytes: int) -> None:
    """Make a file whose blocks are really there: a write to one that isn't would be a SIGBUS."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS
                for start in range(0, num_bytes, ZEROS):
                    file.write(bytes(min(ZEROS, num_bytes - start)))
    except OSError as error:
        raise OutputError(
            f"{path} can't get its {num_bytes / 1e9:.2f} GB: {reason(error)}. Free some space, or "
            "use calibration.cache: memory."
        ) from error
