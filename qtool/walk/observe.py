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
    return _observe(block, linears, hidden, batch, lambda inputs, _output: inputs)


@torch.no_grad()
def observe_outputs(
    block: Block, linears: Sequence[str], hidden: Tensor, batch: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Do the same, but return what comes out of the linears: (tokens, out_features)."""
    return _observe(block, linears, hidden, batch, lambda _inputs, output: output)


def _observe(
    block: Block,
    linears: Sequence[str],
    hidden: Tensor,
    batch: int,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    def run(part: Tensor, call: Call) -> list[Tensor]:
        seen, output = _seen(block, linears, part, call, choose)
        return [*(seen[linear] for linear in linears), output]

    *found, output = block.in_parts(run, hidden, batch)
    return dict(zip(linears, found, strict=True)), output


def _seen(
    block: Block,
    linears: Sequence[str],
    hidden: Tensor,
    call: Call,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    seen: dict[str, Tensor] = {}

    def noting(linear: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, arguments, output: seen.update(
            {linear: choose(arguments[0], output).flatten(0, -2)}
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
