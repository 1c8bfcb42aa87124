"""Backend `reference`: dequantize at every call. The oracle of all others; slow, memory-lean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.runtime.backends.dense import DenseBackend


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as it is stored."""

    tensor: QuantizedTensor
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """Return the weight, (out_features, in_features)."""
        return codec(self.tensor.format).dequantize(self.tensor, torch.float32).to(self.dtype)


class ReferenceBackend(DenseBackend):
    """Keeps the packed parts; one dense weight exists at a time, during its call."""

    name = "reference"
    priority = 0
    owns_layout = False

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> StoredWeight:
        """Return the tensor unchanged."""
        return StoredWeight(tensor, dtype)

    def fuse(
        self, tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
    ) -> None:
        """Return None: weights stay as they are stored."""
        del tensors, dtype, interleave


BACKEND: KernelBackend = ReferenceBackend()
