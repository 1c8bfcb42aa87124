"""Backend `reference`: dequantize at every call. The oracle of all others; slow, memory-lean."""

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec


class ReferenceBackend:
    """Keeps the packed parts; one dense weight exists at a time, during its call."""

    name = "reference"
    priority = 0
    owns_layout = False

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None: it runs everything everywhere."""
        del tensor, device
        return None

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
        """Return the tensor unchanged."""
        del dtype
        return tensor

    def matmul(self, x: Tensor, prepared: QuantizedTensor) -> Tensor:
        """Return x @ W.T."""
        weight = codec(prepared.format).dequantize(prepared, torch.float32).to(x.dtype)
        return torch.nn.functional.linear(x, weight)

    def rows(self, index: Tensor, prepared: QuantizedTensor) -> Tensor:
        """Return the rows that `index` names, float32; dequantizes the whole table."""
        return codec(prepared.format).dequantize(prepared, torch.float32)[index]


BACKEND: KernelBackend = ReferenceBackend()
