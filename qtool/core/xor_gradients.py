"""Signs that a network of XOR gates makes of latent values, with FleXOR's gradient.

Source: Lee et al. 2020 (arXiv 2009.04126): forward the XOR of signs, backward the product of the
other inputs' signs times the slope of tanh, sharper or flatter by S_tanh.
"""

import torch
from torch import Tensor

from qtool.core.autograd import AutogradContext


class _XorSigns(torch.autograd.Function):
    """y_r = (-1)^(taps - 1) times the product of the signs of the inputs that output r taps."""

    @staticmethod
    def forward(ctx: AutogradContext, latent: Tensor, network: Tensor, sharpness: float) -> Tensor:
        made = (network @ (latent >= 0).to(network.dtype)).remainder_(2).mul_(2).sub_(1)
        ctx.save_for_backward(latent, network, made)
        ctx.sharpness = sharpness
        return made

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor, None, None]:
        latent, network, made = ctx.saved_tensors
        # Without one input, a product is itself times that input's sign.
        others = (network.transpose(-1, -2) @ (grad * made)) * torch.where(latent >= 0, 1.0, -1.0)
        slope = ctx.sharpness * (1 - torch.tanh(ctx.sharpness * latent).square())
        return others * slope, None, None


def xor_signs(latent: Tensor, network: Tensor, sharpness: float) -> Tensor:
    """Return the signs that a network makes.

    Args:
        latent: (..., num_inputs, n) float32; 0 and above is a stored 1.
        network: (num_outputs, num_inputs) float32, ones where an output taps an input.
        sharpness: S_tanh of the paper, above 0.

    Returns:
        (..., num_outputs, n) float32, -1 and 1, differentiable in `latent`.
    """
    signs: Tensor = _XorSigns.apply(latent, network, sharpness)  # type: ignore[no-untyped-call]
    return signs
