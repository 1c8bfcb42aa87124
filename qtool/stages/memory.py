"""How much memory the process has used."""

import resource
import sys

import torch


def peak_memory(device: str) -> int:
    """Return the peak in bytes: of the card if `device` is one, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
