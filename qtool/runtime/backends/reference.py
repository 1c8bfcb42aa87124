"""Backend `reference`: dequantize at every call. The oracle of all others; slow, memory-lean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.runtime.decode import torch_ops
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as it is stored."""

    tensor: QuantizedTensor
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """Return the weight, (out_features, in_features)."""
        return codec(self.tensor.format).dequantize(self.tensor, torch.float32).to(self.dtype)


class ReferenceBackend:
    """Keeps the packed parts; one dense weight exists at a time, during its call."""

    name = "reference"
    priority = 0
    owns_layout = False
    decodes_on = "cuda"

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None: it runs everything everywhere."""
        del tensor, device
        return None

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> StoredWeight:
        """Return the tensor unchanged."""
        return StoredWeight(tensor, dtype)

    def matmul(self, x: Tensor, prepared: StoredWeight) -> Tensor:
        """Return x @ W.T."""
        return torch.nn.functional.linear(x, prepared.dense())

    def rows(self, index: Tensor, prepared: StoredWeight) -> Tensor:
        """Return the rows that `index` names; dequantizes the whole table."""
        return prepared.dense()[index]

    def fuse(
        self, tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
    ) -> None:
        """Return None: weights stay as they are stored."""
        del tensors, dtype, interleave

    def decode_ops(self, weights: DecoderWeights) -> DecodeOps:
        """Return the operations in torch."""
        del weights
        return torch_ops.OPS


BACKEND: KernelBackend = ReferenceBackend()
