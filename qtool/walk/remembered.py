"""The original of a block, run once per batch: what its linears saw is kept until the walk goes on.

Statistics ask for it group by group, and the next block for its output: five runs of the same. It
is kept where that is little memory; the larger the model, the more of its time passes elsewhere.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.walk.calls import Call
from qtool.walk.filled_block import Block
from qtool.walk.observe import seen_by

MOST_REMEMBERED = 2**28
"""Bytes of one block."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """What one batch has left in a block."""

    inputs: dict[str, Tensor]
    """By linear, (tokens, in_features)."""
    residual: Tensor | None
    """What the output of the last linear of the MLP is added to, (tokens, width) float32."""
    output: Tensor
    """Of the block, (samples, length, width)."""


def can_remember(hidden: Sequence[Tensor], widths: Collection[int]) -> bool:
    """Return whether a block's walk leaves little memory behind, its quantized copy's too.

    Args:
        hidden: Its batches, each (samples, length, width).
        widths: In_features of the linears whose inputs are asked for.
    """
    if not hidden or not widths:
        return False
    tokens, width = sum(batch[..., 0].numel() for batch in hidden), hidden[0].shape[-1]
    kept = sum(widths) + max(widths) + 3 * width  # outputs, residual stream, attention
    return tokens * kept * torch.float32.itemsize <= MOST_REMEMBERED


class RememberingBlock(Block):
    """A block whose weights stay as they are, and so do its batches."""

    def __init__(self, block: Block, linears: Sequence[str], last: str | None) -> None:
        """Take a block over.

        Args:
            block: The original; nobody changes it any more.
            linears: Names of those whose inputs will be asked for.
            last: The last of the MLP among them, if what its output is added to will be asked for.
        """
        super().__init__(block.module, *block.how_it_runs())
        self._linears, self._last = tuple(linears), last if last in linears else None
        self._batches: dict[int, BlockRun] = {}

    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """Return the block's output, as `Block.run`."""
        return self._of(hidden, batch).output

    def inputs_of(self, linear: str, hidden: Tensor, batch: int) -> Tensor:
        """Return the input of a linear, as `Block.inputs_of`."""
        if linear not in self._linears:
            return super().inputs_of(linear, hidden, batch)
        return self._of(hidden, batch).inputs[linear]

    def around(self, linear: str, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Return input and residual stream of a linear, as `Block.around`."""
        if linear != self._last:
            return super().around(linear, hidden, batch)
        found = self._of(hidden, batch)
        assert found.residual is not None
        return found.inputs[linear], found.residual

    @torch.no_grad()
    def _of(self, hidden: Tensor, batch: int) -> BlockRun:
        if batch not in self._batches:
            *inputs, residual, output = self.in_parts(self._seen, hidden, batch)
            by_name = dict(zip(self._linears, inputs, strict=True))
            kept = residual if self._last is not None else None
            self._batches[batch] = BlockRun(by_name, kept, output)
        return self._batches[batch]

    def _seen(self, hidden: Tensor, call: Call) -> list[Tensor]:
        """Return what goes into each linear, the residual stream or nothing, and the output."""
        seen, output = seen_by(self, self._linears, hidden, call)
        residual = output[..., :0]
        if self._last is not None:
            residual = output.flatten(0, -2).float() - seen[self._last][1].float()
        return [*(seen[linear][0] for linear in self._linears), residual, output]
