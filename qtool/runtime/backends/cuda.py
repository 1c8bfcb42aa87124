"""Backend `cuda`: the kernels of kernels/*.cu, compiled by CuPy. Alone imports it.

CuPy compiles and keeps the results; a launch goes straight to the driver, for CuPy can't mark one
as dependent: the next kernel then starts while the last one ends, and reads its weights ahead.
"""

import ctypes
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.errors import BackendError
from qtool.formats import affine, binary_coding
from qtool.runtime import linear_kernels, operators
from qtool.runtime.launch import Argument, Call, Card, Zeros
from qtool.runtime.linear_kernels import KernelWeight
from qtool.runtime.selection import STORED_KERNELS, wanted_kernel
from qtool.runtime.sources import kernel_source

FORMATS = (affine.FORMAT, binary_coding.FORMAT)
OLDEST = (8, 0)
"""Compute capability: `mma.m16n8k16` came with it."""
DEPENDENT_LAUNCHES = (9, 0)
STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""


class CudaBackend:
    """Executes packed weights; float32 activations go through a dequantized weight."""

    name = "cuda"
    priority = 20
    owns_layout = True

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
        keep = wanted_kernel() in STORED_KERNELS
        return linear_kernels.prepare(tensor, dtype, keep_stored=keep)

    def matmul(self, x: Tensor, prepared: KernelWeight | Tensor) -> Tensor:
        """Return x @ W.T."""
        if isinstance(prepared, Tensor):
            return torch.nn.functional.linear(x, prepared)
        if prepared.stored is None:
            return operators.matmul(x, prepared)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = linear_kernels.matmul(flat, prepared, launch, card_of(x.device.index or 0))
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, index: Tensor, prepared: KernelWeight | Tensor) -> Tensor:
        """Return the rows that `index` names."""
        if isinstance(prepared, Tensor):
            return torch.nn.functional.embedding(index, prepared)
        if prepared.tiles is not None:
            return operators.rows(index, prepared)
        return linear_kernels.rows(index, prepared, launch)


@functools.cache
def card_of(index: int) -> Card:
    """Return what decides a grid on one card."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Card(properties.multi_processor_count, shared, properties.name)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_DEPENDENT = _Attribute(STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))


def launch(call: Call) -> None:
    """Launch a kernel on torch's current stream; waits for nothing, so it can be captured."""
    device = next(a.device.index for a in call.arguments if isinstance(a, Tensor))
    function = _function(call.file, call.kernel, tuple(sorted(call.constants.items())), device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    kept = [_passed(argument, device, stream) for argument in call.arguments]
    pointers = (ctypes.c_void_p * len(kept))(*(ctypes.addressof(value) for value in kept))
    config = _Config(call.grid, (call.threads, 1, 1), call.shared_bytes, stream)
    if _has_dependent_launches(device):
        config.attributes, config.num_attributes = ctypes.pointer(_DEPENDENT), 1
    with torch.cuda.device(device):
        _allow_shared_bytes(function, call.shared_bytes)
        status = _driver().cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function), pointers, None
        )
    if status != 0:
        raise BackendError(
            f"Kernel {call.kernel} wasn't launched: CUDA error {status}, grid {call.grid}, "
            f"{call.threads} threads, {call.shared_bytes} bytes of shared memory. "
            "QTOOL_BACKEND=dense runs the model through torch."
        )


def _passed(argument: Argument, device: int, stream: int) -> Any:  # noqa: ANN401
    """Return what the driver copies into the kernel's arguments."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, Zeros):
        return ctypes.c_void_p(_zeros(argument.words, device, stream).data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


_ZEROS: dict[tuple[int, int, int], Tensor] = {}


def _zeros(words: int, device: int, stream: int) -> Tensor:
    """Return zeros that no other stream uses.

    A captured graph may run beside the stream it was captured on, so each capture has its own; what
    fills them is captured too, so a replay that was broken off leaves nothing behind.
    """
    capture = _capture_id(stream)
    key = (device, stream, capture)
    found = _ZEROS.get(key)
    if found is None or found.numel() < words:
        for old in [k for k in _ZEROS if k[2] not in (0, capture)]:
            del _ZEROS[old]  # of captures that have ended: the memory stays with their graphs
        found = torch.zeros(words, dtype=torch.int64, device=f"cuda:{device}")
        _ZEROS[key] = found
    return found


def _capture_id(stream: int) -> int:
    """Return the number of the capture that the stream takes part in, 0 if none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@functools.cache
def _has_dependent_launches(device: int) -> bool:
    wanted = os.environ.get("QTOOL_DEPENDENT_LAUNCHES", "1") != "0"
    return wanted and torch.cuda.get_device_capability(device) >= DEPENDENT_LAUNCHES


_ALLOWED: dict[int, int] = {}


def _allow_shared_bytes(function: int, shared_bytes: int) -> None:
    """Raise what a kernel may take."""
    if shared_bytes > _ALLOWED.get(function, 0):
        limit, carveout = 8, 9  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, PREFERRED_...
        _driver().cuFuncSetAttribute(ctypes.c_void_p(function), limit, shared_bytes)
        # All of it, so that the next launch's blocks find room beside these.
        _driver().cuFuncSetAttribute(ctypes.c_void_p(function), carveout, 100)
        _ALLOWED[function] = shared_bytes


@functools.cache
def _function(file: str, kernel: str, constants: tuple[tuple[str, int], ...], device: int) -> int:
    """Compile a kernel for one card; CuPy keeps the result on disk, by source and architecture."""
    import cupy

    with torch.cuda.device(device), cupy.cuda.Device(device):
        source = kernel_source(file, dict(constants))
        module = cupy.RawModule(code=source, options=("--std=c++17",))
        compiled = module.get_function(kernel).kernel
    _MODULES.append(module)  # a function lives as long as its module
    return int(compiled.ptr)


_MODULES: list[Any] = []


operators.implement(launch, card_of)
BACKEND: KernelBackend = CudaBackend()
