"""What a quantized module holds to run its weight, once that is prepared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qtool.base import IntegerProduct, KernelBackend, QuantizedTensor


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


def takes_over(held: Held, weight: Callable[[], QuantizedTensor]) -> bool:
    """Return whether what is prepared has the scales and offsets of a weight now.

    Args:
        held: What is prepared; it may have a method `rescale`.
        weight: Gives the weight, whose planes are those that it has, on the host.
    """
    rescale = getattr(held.prepared, "rescale", None)
    if rescale is None or held.integers is not None:
        return False
    took = bool(rescale(weight()))
    if held.home is not None:
        finish_packing(held.home)
    return took
