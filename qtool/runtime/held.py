"""What a quantized module holds to run its weight, once that is prepared."""

from dataclasses import dataclass
from typing import Any

import torch

from qtool.base import IntegerProduct, KernelBackend


@dataclass(frozen=True, slots=True)
class Held:
    """What runs a weight; one object, so that other threads see all of it or nothing."""

    backend: KernelBackend
    prepared: Any
    """What the backend made."""
    dtype: torch.dtype
    """Of the activations."""
    home: torch.device | None
    """Where the weight is executed while its parts wait in the host's memory; None: they don't."""
    integers: IntegerProduct | None = None
    """Runs inputs that are quantized, if there are enough; None: the backend's `matmul` does."""


def finish_packing(device: torch.device) -> None:
    """Wait until a weight is there: kernels read weights before they wait for what came before."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()
