"""Modules of Triton kernels: taken where they can run, and said once where they can't."""

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch


@cache
def usable_kernels(name: str, probe: str, device: torch.device) -> ModuleType | None:
    """Return a module of `qtool.core`; None where it can't run.

    Args:
        name: Of the module.
        probe: Its function that compiles and runs the smallest case on a device.
        device: Where it is to run.
    """
    if device.type != "cuda":
        return None
    try:
        module = importlib.import_module(f"qtool.core.{name}")
    except ImportError:
        return None
    try:
        getattr(module, probe)(device)
    except Exception as error:  # noqa: BLE001 - Triton needs a C compiler, and more may be amiss
        warnings.warn(f"Triton kernels can't be built; this takes longer: {error}", stacklevel=2)
        return None
    return module
