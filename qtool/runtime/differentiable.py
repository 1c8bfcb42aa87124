"""Products with quantized weights whose inputs learn: adapters sit below them, and beside them."""

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.base import BackendWeight, KernelBackend
from qtool.core.autograd import AutogradContext
from qtool.scheme import Shape2D

Multiply = Callable[[Tensor], Tensor]
BACKWARD_CHUNK = 2**26
"""Elements of a weight that are dequantized at once on the way back."""


def as_autocast(x: Tensor) -> Tensor:
    """Return the input of a linear in the dtype that autocast wants, if it is on."""
    kind = x.device.type
    if x.dtype == torch.float64:
        return x
    # Compilers before torch 2.12 can't ask whether it is available; what they compile for has it.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def multiply_differentiably(
    x: Tensor,
    multiply: Multiply,
    weight: tuple[KernelBackend, BackendWeight],
    shape: Shape2D,
) -> Tensor:
    """Return what `multiply` makes of an input, with a gradient for the input if one is wanted.

    No backend needs a backward pass: the gradient is a product with rows of the weight, which are
    dequantized for it and not kept. Through inputs that are rounded it passes straight (Bengio et
    al., 2013, arXiv:1308.3432).

    Args:
        x: (..., in_features).
        multiply: x -> x @ W.T, (..., out_features).
        weight: A backend and what it made of W.
        shape: Of W.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return multiply(x)
    product: Tensor = _Product.apply(x, multiply, weight, shape)  # type: ignore[no-untyped-call]
    return product


class _Product(torch.autograd.Function):
    """x @ W.T."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        x: Tensor,
        multiply: Multiply,
        weight: tuple[KernelBackend, BackendWeight],
        shape: Shape2D,
    ) -> Tensor:
        ctx.weight, ctx.shape = weight, shape
        product: Tensor = multiply(x)
        return product

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (backend, prepared), (rows, inputs) = ctx.weight, ctx.shape
        index = torch.arange(rows, device=gradient.device).split(max(1, BACKWARD_CHUNK // inputs))
        parts = (
            part @ backend.rows(chosen, prepared).to(part.dtype)
            for chosen, part in zip(index, gradient.split(len(index[0]), -1), strict=True)
        )
        return sum(parts, next(parts)), None, None, None
