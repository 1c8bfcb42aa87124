"""Backend `cuda`: the kernels of kernels/*.cu, on a card with CuPy."""

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.formats import affine, binary_coding
from qtool.runtime import linear_kernels, operators
from qtool.runtime.driver import card_of, launch, why_not_on
from qtool.runtime.linear_kernels import KernelWeight
from qtool.runtime.selection import STORED_KERNELS, wanted_kernel

FORMATS = (affine.AFFINE, binary_coding.BINARY_CODING)


class CudaBackend:
    """Executes packed weights; activations of 32 bit and more go through a dequantized one."""

    name = "cuda"
    priority = 20
    owns_layout = True

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None for a weight of planes on a card with CuPy, else what is missing."""
        if tensor.format not in FORMATS:
            return f"it runs {' and '.join(FORMATS)} weights; this one is {tensor.format}."
        return why_not_on(device)

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> KernelWeight | Tensor:
        """Return the re-laid weight; in dtypes that the kernels don't take, a dense one."""
        if dtype not in (torch.float16, torch.bfloat16):
            return codec(tensor.format).dequantize(tensor, dtype)
        keep = wanted_kernel() in STORED_KERNELS
        return linear_kernels.prepare(tensor, dtype, keep_stored=keep)

    def matmul(self, x: Tensor, prepared: KernelWeight | Tensor) -> Tensor:
        """Return x @ W.T."""
        if isinstance(prepared, Tensor):
            return torch.nn.functional.linear(x, prepared)
        if prepared.stored is None:
            return operators.matmul_operator(x, prepared)
        return _matmul(x, prepared)

    def rows(self, index: Tensor, prepared: KernelWeight | Tensor) -> Tensor:
        """Return the rows that `index` names."""
        if isinstance(prepared, Tensor):
            return torch.nn.functional.embedding(index, prepared)
        if prepared.tiles is not None:
            return operators.rows_operator(index, prepared)
        return _rows(index, prepared)


def _matmul(x: Tensor, weight: KernelWeight) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    y = linear_kernels.matmul(tokens, weight, launch, card_of(x.device.index or 0))
    return y.view(*x.shape[:-1], y.shape[-1])


def _rows(index: Tensor, weight: KernelWeight) -> Tensor:
    return linear_kernels.rows(index, weight, launch)


operators.implement(_matmul, _rows)
BACKEND: KernelBackend = CudaBackend()
