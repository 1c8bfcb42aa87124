"""Errors of a quantized weight."""

import torch
from torch import Tensor


def nmse(reference: Tensor, approximation: Tensor) -> float:
    """Return ||reference - approximation||^2 / ||reference||^2; 0 where both are zero."""
    error = torch.sum((reference.double() - approximation.double()) ** 2)
    power = torch.sum(reference.double() ** 2)
    return float(error / power) if power > 0 else float(error)
