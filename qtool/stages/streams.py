"""The cached block inputs: what the original and the quantized model carry from block to block."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qtool.modeling.blocks import Block


@dataclass(frozen=True, slots=True)
class Streams:
    """Inputs of the next block, batch by batch, off the card; overwritten block by block."""

    original: tuple[Tensor, ...]  # each (samples, length, width), of the original model
    quantized: tuple[Tensor, ...]  # the same in the quantized model
    num_train: int
    """Batches from this one on are held out."""

    def advance(self, original: Block, quantized: Block) -> None:
        """Replace all block inputs by the block's outputs."""
        for block, batches in ((original, self.original), (quantized, self.quantized)):
            for index, batch in enumerate(batches):
                batch.copy_(block.run(batch, index), non_blocking=True)
        if batches[0].is_pinned():
            torch.cuda.synchronize()


def make_streams(
    hidden: Sequence[Tensor], num_train: int, *, device: str, directory: Path | None
) -> Streams:
    """Copy the inputs of the first block into buffers for both models.

    Args:
        hidden: Inputs of the first block, each (samples, length, width), on the CPU.
        num_train: How many of them are not held out.
        device: Where blocks run. For a card the buffers are page-locked: copies to and from them
            are several times faster, and don't make the CPU wait.
        directory: Keep the buffers in two files there, mapped into memory; None: in memory.
    """
    pinned = device.startswith("cuda") and directory is None
    both = []
    for name in ("original", "quantized"):
        total = sum(batch.numel() for batch in hidden)
        if directory is not None:
            path = str(directory / f"{name}.stream")
            buffer = torch.from_file(path, shared=True, size=total, dtype=hidden[0].dtype)
        else:
            buffer = torch.empty(total, dtype=hidden[0].dtype, pin_memory=pinned)
        parts = buffer.split([prod(batch.shape) for batch in hidden])
        views = tuple(part.view(batch.shape) for part, batch in zip(parts, hidden, strict=True))
        for view, batch in zip(views, hidden, strict=True):
            view.copy_(batch)
        both.append(views)
    return Streams(both[0], both[1], num_train)
