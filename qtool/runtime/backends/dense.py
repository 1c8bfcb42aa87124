"""Backend `dense`: dequantize once, then run torch. Fast without kernels, saves no memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.base import Fused, IntegerProduct, KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.runtime.decode import torch_ops
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.parallel import spread_ops
from qtool.runtime.decode.weights import DecoderWeights, Projection


class DenseBackend:
    """Holds each weight in the dtype of the model, as if it had never been quantized."""

    name = "dense"
    priority = 10
    owns_layout = True
    decodes_on = "cuda"

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None: it runs everything everywhere."""
        del tensor, device
        return None

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> Projection:
        """Return the weight, (out_features, in_features) in `dtype`."""
        return codec(tensor.format).dequantize(tensor, torch.float32).to(dtype)

    def matmul(self, x: Tensor, prepared: Projection) -> Tensor:
        """Return x @ W.T."""
        return torch.nn.functional.linear(x, torch_ops.dense(prepared))

    def rows(self, index: Tensor, prepared: Projection) -> Tensor:
        """Return the rows that `index` names."""
        return torch.nn.functional.embedding(index, torch_ops.dense(prepared))

    def integer_product(self, tensor: QuantizedTensor, dtype: torch.dtype) -> IntegerProduct | None:
        """Return None: torch multiplies floats."""
        del tensor, dtype
        return None

    def fuse(
        self, tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
    ) -> Fused | None:
        """Put the weights one below the other; each is a view of its rows."""
        del interleave
        both = torch.cat([torch_ops.dense(self.prepare(tensor, dtype)) for tensor in tensors])
        return Fused(both, both.split([tensor.shape.out_features for tensor in tensors]))

    def decode_ops(self, weights: DecoderWeights) -> DecodeOps:
        """Return the operations in torch."""
        return spread_ops(torch_ops.OPS, weights)


BACKEND: KernelBackend = DenseBackend()
