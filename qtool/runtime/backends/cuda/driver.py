"""Launches through the CUDA driver: kernels/*.cu, as `compiling` has them.

A launch goes straight to the driver, for CuPy can't mark one as dependent: the next kernel then
starts while the last one ends, and reads its weights ahead.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtool import settings
from qtool.errors import BackendError, install_line
from qtool.runtime.backends.cuda.compiling import compiled_function, source_of
from qtool.runtime.backends.cuda.launch import LAST_OF_BITS, OLDEST, WARPGROUPS, Card, KernelCall

DEPENDENT_LAUNCHES = (9, 0)
COOPERATIVE, STREAM_SERIALIZATION = 2, 6
"""CU_LAUNCH_ATTRIBUTE_COOPERATIVE, _PROGRAMMATIC_STREAM_SERIALIZATION"""


def why_not_on(device: torch.device) -> str | None:
    """Return None for a card that the kernels run on, else what is missing."""
    if device.type != "cuda":
        return f"it needs a CUDA card; the model is on {device.type}."
    missing = _why_no_cupy()
    if missing is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "it needs a card of compute capability 8.0 or newer."
    return missing


@functools.cache
def _why_no_cupy() -> str | None:
    """Return None if CuPy is there and fits torch's CUDA, else what to install."""
    major = (torch.version.cuda or "").partition(".")[0]
    extra = "gpu12" if major == "12" else "gpu"
    try:
        import cupy

        theirs = cupy.cuda.runtime.runtimeGetVersion() // 1000
    except Exception as error:  # noqa: BLE001 - whatever stops it, another backend can run
        return f"it needs CuPy ({type(error).__name__}: {error}): {install_line(extra)}."
    if major and theirs != int(major):
        return f"CuPy is made for CUDA {theirs}, torch for {major}: {install_line(extra)}."
    return None


@functools.cache
def card_of(index: int) -> Card:
    """Return what decides a grid on one card."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    capability = torch.cuda.get_device_capability(index)
    return Card(
        properties.multi_processor_count,
        shared,
        properties.name,
        warpgroups=capability == WARPGROUPS,
        counts_bits=OLDEST <= capability <= LAST_OF_BITS,
    )


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


class _PreparedCall:
    """A call on one card with all that the driver takes: a launch fills in pointers and stream."""

    def __init__(self, call: KernelCall, device: int, num_tensors: int) -> None:
        function = compiled_function(source_of(call), device)
        _allow_shared_bytes(function, call.shared_bytes)
        self._call = call
        self._config = config = _Config(call.grid, (call.threads, 1, 1), call.shared_bytes)
        ids = [STREAM_SERIALIZATION] if call.dependent and _has_dependent_launches(device) else []
        ids += [COOPERATIVE] if call.together else []
        on = (_Attribute(kind, 0, (ctypes.c_int * 16)(1)) for kind in ids)
        config.attributes, config.num_attributes = (_Attribute * len(ids))(*on), len(ids)
        self._pointers = (ctypes.c_void_p * (num_tensors + bool(call.zeros)))()
        self._numbers = [
            ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)
            for value in call.numbers
        ]
        begin, size = ctypes.addressof(self._pointers), ctypes.sizeof(ctypes.c_void_p)
        places = [begin + size * index for index in range(len(self._pointers))]
        places += map(ctypes.addressof, self._numbers)
        arguments = (ctypes.c_void_p * len(places))(*places)
        self._passed = (ctypes.byref(config), ctypes.c_void_p(function), arguments, None)
        self._lock = threading.Lock()

    def launch(self, pointers: list[Any], stream: int) -> None:
        """Launch it, from one thread at a time: then the driver has copied the arguments."""
        with self._lock:
            self._pointers[:] = pointers
            self._config.stream = stream
            status = _driver().cuLaunchKernelEx(*self._passed)
        if status != 0:
            call = self._call
            raise BackendError(
                f"Kernel {call.kernel} wasn't launched: CUDA error {status}, grid {call.grid}, "
                f"{call.threads} threads, {call.shared_bytes} bytes of shared memory. "
                "QTOOL_BACKEND=dense runs the model through torch."
            )


_prepared = functools.lru_cache(4096)(_PreparedCall)  # a model has dozens per number of tokens


def launch(call: KernelCall, tensors: Sequence[Tensor | None]) -> None:
    """Launch a kernel on torch's current stream; waits for nothing, so it can be captured.

    Raises:
        BackendError: the tensors aren't on one card, or the driver refuses the launch.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    first = devices.pop()
    if devices or first.type != "cuda":
        names = ", ".join(sorted(map(str, {first, *devices})))
        raise BackendError(
            f"Kernel {call.kernel} takes tensors of one CUDA device, not of {names}: move inputs "
            "and model to the same one."
        )
    device = first.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(call, tensors)
        return
    _bind_thread(device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    if call.zeros:
        pointers.append(_zeros(call.zeros, device, stream).data_ptr())
    _prepared(call, device, len(tensors)).launch(pointers, stream)


_BOUND = threading.local()


def _bind_thread(device: int) -> None:
    """Give a new thread the card's context; torch does so at its own first launch there only."""
    if getattr(_BOUND, "device", None) != device:
        torch.cuda.set_device(torch.cuda.current_device())
        torch.cuda.current_stream(device).query()
        _BOUND.device = device


_ZEROS: dict[tuple[int, int, int], Tensor] = {}
_SPARE: dict[int, Tensor] = {}
_KEPT: list[Tensor] = []


def _zeros(words: int, device: int, stream: int) -> Tensor:
    """Return zeros that nothing else uses at the same time.

    One tensor per stream; one per capture, for a graph may be replayed beside the stream it was
    captured on. That one was made before the capture began: memory of the graph's own pool would
    have to be zeroed at every replay. As nobody says when a graph has gone, it is never freed.
    """
    capture = _capture_of(stream) if torch.cuda.is_current_stream_capturing() else 0
    found = _ZEROS.get((device, stream, capture))
    if found is None or found.numel() < words:
        if found is not None:
            _KEPT.append(found)  # launches that were captured still use it
        found = _SPARE.pop(device, None) if capture else None
        if found is None or found.numel() < words:
            found = torch.zeros(words, dtype=torch.int64, device=f"cuda:{device}")
        _ZEROS[device, stream, capture] = found
    if not capture and (device not in _SPARE or _SPARE[device].numel() < words):
        _SPARE[device] = torch.zeros(words, dtype=torch.int64, device=f"cuda:{device}")
    return found


def _capture_of(stream: int) -> int:
    """Return the number of the capture that a stream takes part in, 0 if none."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    error = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error != 0:
        raise BackendError(f"The driver doesn't say whether a stream is captured: error {error}.")
    return number.value if status.value != 0 else 0


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@functools.cache
def _has_dependent_launches(device: int) -> bool:
    able = torch.cuda.get_device_capability(device) >= DEPENDENT_LAUNCHES
    return able and settings.dependent_launches()


_ALLOWED: dict[int, int] = {}


def _allow_shared_bytes(function: int, shared_bytes: int) -> None:
    """Raise what a kernel may take."""
    if shared_bytes > _ALLOWED.get(function, 0):
        limit, carveout = 8, 9  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, PREFERRED_...
        set_to = _driver().cuFuncSetAttribute
        error = set_to(ctypes.c_void_p(function), limit, shared_bytes)
        if error != 0:
            raise BackendError(
                f"The driver doesn't give a kernel {shared_bytes} bytes of shared memory: error "
                f"{error}. QTOOL_BACKEND=dense runs the model through torch."
            )
        # All of it, so that the next launch's blocks find room beside these.
        set_to(ctypes.c_void_p(function), carveout, 100)
        _ALLOWED[function] = shared_bytes
