"""What several linears of a block see, or put out, in one run of it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import ModelError
from qtool.walk.calls import Call
from qtool.walk.filled_block import Block


@torch.no_grad()
def observe(
    block: Block, linears: Sequence[str], hidden: Tensor, batch: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a whole block; return what goes into some of its linears and what comes out of it.

    Args:
        block: The block.
        linears: Their names in it.
        hidden: Its input, (samples, length, width).
        batch: Which of the captured batches it is.

    Returns:
        By linear (tokens, in_features), and the block's output, like `hidden`.

    Raises:
        ModelError: a linear was never called, or the block can't run by itself.
    """
    return _observe(block, linears, hidden, batch, 0)


@torch.no_grad()
def observe_outputs(
    block: Block, linears: Sequence[str], hidden: Tensor, batch: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Do the same, but return what comes out of the linears: (tokens, out_features)."""
    return _observe(block, linears, hidden, batch, 1)


def _observe(
    block: Block, linears: Sequence[str], hidden: Tensor, batch: int, side: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return of each linear what is on one side of it: 0 what goes in, 1 what comes out."""

    def run(part: Tensor, call: Call) -> list[Tensor]:
        seen, output = seen_by(block, linears, part, call)
        return [*(seen[linear][side] for linear in linears), output]

    *found, output = block.in_parts(run, hidden, batch)
    return dict(zip(linears, found, strict=True)), output


def seen_by(
    block: Block, linears: Sequence[str], hidden: Tensor, call: Call
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Run a whole block on samples; return what goes into some of its linears and out of them.

    Args:
        block: The block.
        linears: Their names in it.
        hidden: Its input, (samples, length, width).
        call: What it is called with for these samples.

    Returns:
        By linear (tokens, in_features) and (tokens, out_features), and the block's output.

    Raises:
        ModelError: a linear was never called, or the block can't run by itself.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(linear: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, arguments, output: seen.update(
            {linear: (arguments[0].flatten(0, -2), output.flatten(0, -2))}
        )

    with ExitStack() as hooks:
        for linear in linears:
            module = block.module.get_submodule(linear)
            hooks.enter_context(module.register_forward_hook(noting(linear)))
        output = block.output(hidden, call)
    for linear in linears:
        if linear not in seen:
            raise ModelError(f"{linear} was never called: nothing of it can be measured.")
    return seen, output
