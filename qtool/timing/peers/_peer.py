"""What a peer is: a kernel of another library, which takes a dense weight and multiplies by it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.runtime.backends.cuda.launch import OLDEST

GROUP_SIZE, FLOAT16 = 128, torch.float16


@dataclass(frozen=True, slots=True)
class PeerWeight:
    """A weight as a peer keeps it."""

    matmul: Callable[[Tensor], object]
    num_bytes: int
    """Packed weights, scales and zero points."""
    dense: Callable[[], Tensor] | None = None
    """Makes what its codes stand for, (out_features, in_features); None: the peer doesn't tell, so
    products are held against the weight that was quantized."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A kernel of another library."""

    name: str
    build: Callable[[Tensor], PeerWeight]
    """Takes a dense float16 weight, (out_features, in_features)."""
    dtype: torch.dtype = FLOAT16
    """Of the activations."""
    module: str = "torch"
    """It is imported by this name."""
    package: str = ""
    """pip installs it by this name; empty: the module's."""
    multiple: int = 1
    """in_features must be one of it."""
    row_multiple: int = 1
    """out_features must be one of it."""
    only: tuple[int, int] | None = None
    """The one compute capability that it is compiled for; None: all that ours take."""

    @property
    def is_in_torch(self) -> bool:
        """Return whether it is always there, so that it is timed without being asked for."""
        return self.module == "torch"

    def why_not(self, device: torch.device) -> str | None:
        """Return None if it can be timed on a device, else what is missing."""
        if importlib.util.find_spec(self.module) is None:
            return f"isn't installed: pip install {self.package or self.module}"
        if device.type != "cuda":
            return "needs a CUDA card"
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST:
            return "needs a card of compute capability 8.0 or newer"
        if self.only not in (None, found):
            return f"needs a card of compute capability {'.'.join(map(str, self.only or ()))}"
        return None

    def why_not_shape(self, out_features: int, in_features: int) -> str | None:
        """Return None if it takes weights of a shape, else what it needs."""
        if in_features % self.multiple:
            return f"needs a multiple of {self.multiple} inputs"
        if out_features % self.row_multiple:
            return f"needs a multiple of {self.row_multiple} outputs"
        return None


def affine_codes(weight: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to steps above a minimum: what peers pack differ in how they pack it.

    Args:
        weight: (out_features, in_features), a multiple of 128 inputs.
        num_bits: Of a code.

    Returns:
        Codes, uint8 of the weight's shape; steps and minima of each group, in the weight's dtype.
    """
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1)
    steps = ((high - low) / (2**num_bits - 1)).clamp_(min=1e-6)
    codes = (groups - low.unsqueeze(-1)).div_(steps.unsqueeze(-1)).round_().to(torch.uint8)
    return codes.clamp_(max=2**num_bits - 1).flatten(1), steps, low


def symmetric_codes(weight: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Round to w = (code - 2^(num_bits - 1)) * scale: codes and scales, as `affine_codes`."""
    groups, middle = weight.unflatten(1, (-1, GROUP_SIZE)), 2 ** (num_bits - 1)
    scales = (groups.abs().amax(-1) / (middle - 1 or 1)).clamp_(min=1e-6)
    codes = groups.div(scales.unsqueeze(-1)).round_().add_(middle).clamp_(0, 2 * middle - 1)
    return codes.to(torch.uint8).flatten(1), scales


def of_groups(codes: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    """Return code * scale + shift in float32: scales and shifts are (out_features, groups)."""
    groups = codes.unflatten(1, (-1, GROUP_SIZE)).float()
    return groups.mul_(scales.float().unsqueeze(-1)).add_(shifts.float().unsqueeze(-1)).flatten(1)


def stored_size(*tensors: Tensor) -> int:
    """Return what tensors take together."""
    return sum(tensor.nbytes for tensor in tensors)
