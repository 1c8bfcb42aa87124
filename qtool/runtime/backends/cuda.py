"""Backend `cuda`: the kernels of kernels/*.cu, compiled and launched by CuPy. Imports it alone."""

import functools
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.formats import affine, binary_coding
from qtool.runtime import linear_kernels
from qtool.runtime.launch import Argument, Call, Card
from qtool.runtime.linear_kernels import KernelWeight
from qtool.runtime.sources import kernel_source

FORMATS = (affine.FORMAT, binary_coding.FORMAT)
OLDEST = (8, 0)
"""Compute capability: `mma.m16n8k16` came with it."""
STATIC_SHARED_BYTES = 48 * 1024
"""More has to be asked for, once per kernel."""


class CudaBackend:
    """Executes packed weights; float32 activations go through a dequantized weight."""

    name = "cuda"
    priority = 5
    """Below `dense` until it has been run and timed on a card: it must be asked for by name."""

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None for a weight of planes on a card with CuPy, else what is missing."""
        if tensor.format not in FORMATS:
            return f"it runs {' and '.join(FORMATS)} weights; this one is {tensor.format}."
        if device.type != "cuda":
            return f"it needs a CUDA card; the model is on {device.type}."
        if importlib.util.find_spec("cupy") is None:
            return "it needs CuPy: pip install 'qtool[gpu]'."
        if torch.cuda.get_device_capability(device) < OLDEST:
            return "it needs a card of compute capability 8.0 or newer."
        return None

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> KernelWeight | Tensor:
        """Return the re-laid weight; in float32, which the kernels don't take, a dense one."""
        if dtype == torch.float32:
            return codec(tensor.format).dequantize(tensor, torch.float32)
        return linear_kernels.prepare(tensor, dtype)

    def matmul(self, x: Tensor, prepared: KernelWeight | Tensor) -> Tensor:
        """Return x @ W.T."""
        if isinstance(prepared, Tensor):
            return torch.nn.functional.linear(x, prepared)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = linear_kernels.matmul(flat, prepared, launch, card_of(x.device.index or 0))
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, index: Tensor, prepared: KernelWeight | Tensor) -> Tensor:
        """Return the rows that `index` names."""
        if isinstance(prepared, Tensor):
            return torch.nn.functional.embedding(index, prepared)
        return linear_kernels.rows(index, prepared, launch)


@functools.cache
def card_of(index: int) -> Card:
    """Return what decides a grid on one card."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Card(properties.multi_processor_count, shared)


def launch(call: Call) -> None:
    """Launch a kernel on torch's current stream; waits for nothing, so it can be captured."""
    import cupy

    device = next(a.device.index for a in call.arguments if isinstance(a, Tensor))
    function = _function(call.file, call.kernel, tuple(sorted(call.constants.items())), device)
    if call.shared_bytes > STATIC_SHARED_BYTES:
        function.max_dynamic_shared_size_bytes = max(
            call.shared_bytes, function.max_dynamic_shared_size_bytes
        )
    stream = torch.cuda.current_stream(device).cuda_stream
    arguments = tuple(_passed(argument) for argument in call.arguments)
    with torch.cuda.device(device), cupy.cuda.ExternalStream(stream, device):
        function(call.grid, (call.threads, 1, 1), arguments, shared_mem=call.shared_bytes)


def _passed(argument: Argument) -> Any:  # noqa: ANN401
    """Return what CuPy copies into the kernel's arguments: a pointer or a 32-bit number."""
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.uint64(0) if argument is None else np.int32(argument)


@functools.cache
def _function(file: str, kernel: str, constants: tuple[tuple[str, int], ...], device: int) -> Any:  # noqa: ANN401
    """Compile a kernel for one card; CuPy keeps the result on disk, by source and architecture."""
    import cupy

    with torch.cuda.device(device):
        source = kernel_source(file, dict(constants))
        return cupy.RawModule(code=source, options=("--std=c++17",)).get_function(kernel)


BACKEND: KernelBackend = CudaBackend()
