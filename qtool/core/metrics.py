"""Errors of a quantized weight."""

import torch
from torch import Tensor

from qtool.core.hessian import relative_loss


def of_layer(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> dict[str, float]:
    """Return what a method reports: `nmse` and, with a Hessian of the inputs, `loss`."""
    measured = {"nmse": nmse(weight, quantized)}
    if hessian is not None:
        measured["loss"] = relative_loss(quantized - weight, weight, hessian)
    return measured


def nmse(reference: Tensor, approximation: Tensor) -> float:
    """Return ||reference - approximation||^2 / ||reference||^2; 0 where both are zero."""
    error = torch.sum((reference.double() - approximation.double()) ** 2)
    power = torch.sum(reference.double() ** 2)
    return float(error / power) if power > 0 else float(error)


def squared(values: Tensor) -> float:
    """Return the sum of the squares of values, in float64."""
    return float(values.square().sum(dtype=torch.float64))
