"""Backend `dense`: dequantize once, then run torch. Fast without kernels, saves no memory."""

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec


class DenseBackend:
    """Holds each weight in the dtype of the model, as if it had never been quantized."""

    name = "dense"
    priority = 10
    owns_layout = True

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None: it runs everything everywhere."""
        del tensor, device
        return None

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out_features, in_features) in `dtype`."""
        return codec(tensor.format).dequantize(tensor, torch.float32).to(dtype)

    def matmul(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Return x @ W.T."""
        return torch.nn.functional.linear(x, prepared)

    def rows(self, index: Tensor, prepared: Tensor) -> Tensor:
        """Return the rows that `index` names."""
        return torch.nn.functional.embedding(index, prepared)


BACKEND: KernelBackend = DenseBackend()
