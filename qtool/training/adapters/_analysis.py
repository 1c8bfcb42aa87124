"""What a pass over some exercises says of linears: moments of inputs, gradients of outputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import ModelPart
from qtool.core.hessian import accumulate
from qtool.training.adapters import Adaptable

CHUNK_NUMBERS = 2**28
"""Sums that are held at a time, in numbers: 1 GiB."""


@dataclass(slots=True)
class Seen:
    """Of one linear, over all tokens of the pass."""

    moments: Tensor  # (in_features, in_features) float32: sum of x x^T
    gradient: Tensor | None
    """(out_features, in_features) float32: of the summed loss; None: it wasn't asked for."""
    pull: float = 0.0
    """Sum of the squared gradient of the loss by an output."""
    tokens: int = 0

    def gain(self, out_features: int) -> float:
        """Return what a squared error of the output costs, in units that all layers share."""
        return self.pull / max(1, self.tokens * out_features)


def passes(what: Adaptable, *, gradients: bool) -> Iterator[tuple[str, Seen]]:
    """Yield what was seen of each linear; the exercises run as often as memory asks for.

    Args:
        what: With exercises that aren't padded.
        gradients: Sum up gradients of whole weights too.
    """
    names = list(what.linears)
    while names:
        chunk, numbers = list[str](), 0
        while names and (not chunk or numbers < CHUNK_NUMBERS):
            outputs, inputs = what.linears[names[0]].entry.shape
            numbers += inputs * (inputs + (outputs if gradients else 0))
            chunk.append(names.pop(0))
        yield from _pass(what, {name: what.linears[name] for name in chunk}, gradients).items()


def _pass(what: Adaptable, chunk: Mapping[str, Any], gradients: bool) -> dict[str, Seen]:  # noqa: FBT001
    found = {name: _empty(linear, gradients=gradients) for name, linear in chunk.items()}
    with ExitStack() as stack:
        table = what.model.get_input_embeddings()
        stack.callback(table.register_forward_hook(_let_learn).remove)
        for name, linear in chunk.items():
            stack.callback(linear.register_forward_hook(_watch(found[name])).remove)
        for batch in what.exercises:
            what.surprise(batch).backward()
    return found


def _empty(linear: ModelPart, *, gradients: bool) -> Seen:
    outputs, inputs = linear.entry.shape
    moments = torch.zeros(inputs, inputs, device=linear.device)
    gradient = torch.zeros(outputs, inputs, device=linear.device) if gradients else None
    return Seen(moments, gradient)


def _let_learn(_module: nn.Module, _inputs: Sequence[Any], output: Tensor) -> Tensor:
    """Give the rows of the embedding a gradient, as nothing before a linear has one."""
    return output.detach().requires_grad_()


def _watch(seen: Seen) -> Any:  # noqa: ANN401
    def hook(_module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        accumulate(seen.moments, x, x)
        seen.tokens += len(x)

        def back(grad: Tensor) -> None:
            flat = grad.detach().flatten(0, -2)
            seen.pull += float(flat.float().square().sum())
            if seen.gradient is not None:
                accumulate(seen.gradient, flat, x.to(flat.dtype))

        output.register_hook(back)

    return hook
