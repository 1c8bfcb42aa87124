"""kernels/*.cu compiled for a card by CuPy's NVRTC: side by side, and kept on disk."""

import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

import torch

from qtool import settings
from qtool.errors import BackendError
from qtool.runtime.backends.cuda.launch import KernelCall
from qtool.runtime.backends.cuda.sources import kernel_source
from qtool.storage.whole_files import written_whole

OPTIONS = ("--std=c++17",)
MOST_COMPILERS = 16
"""Threads: each takes a tenth of a gigabyte, about."""


class KernelSource(NamedTuple):
    """What is compiled, of a launch."""

    file: str
    kernel: str
    constants: tuple[tuple[str, int], ...]
    one_architecture: bool


def source_of(call: KernelCall) -> KernelSource:
    """Return what a launch needs compiled."""
    return KernelSource(call.file, call.kernel, call.constants, call.one_architecture)


def compile_ahead(calls: Iterable[KernelCall], device: int) -> None:
    """Compile what launches on a card will need, side by side: half a second each, alone.

    Raises:
        BackendError: the compiler doesn't take one.
    """
    wanted = dict.fromkeys(map(source_of, calls))
    compilers = min(MOST_COMPILERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(compilers) as pool:
        for _ in pool.map(lambda source: compiled_function(source, device), wanted):
            pass


@functools.cache
def compiled_function(source: KernelSource, device: int) -> int:
    """Return a kernel as the driver of one card knows it; compiled unless that was done before.

    Raises:
        BackendError: the compiler doesn't take it.
    """
    import cupy

    with torch.cuda.device(device), cupy.cuda.Device(device):
        text = kernel_source(source.file, dict(source.constants))
        if source.one_architecture:
            module = cupy.cuda.function.Module()
            major, minor = torch.cuda.get_device_capability(device)
            module.load(machine_code(text, f"sm_{major}{minor}a"))
            compiled = module.get_function(source.kernel)
        else:
            module = cupy.RawModule(code=text, options=OPTIONS)
            compiled = module.get_function(source.kernel).kernel
    _MODULES.append(module)  # a function lives as long as its module
    return int(compiled.ptr)


_MODULES: list[Any] = []


def machine_code(text: str, architecture: str) -> bytes:
    """Compile for one architecture alone: CuPy's modules, and what it keeps, know no `sm_90a`.

    What is compiled is kept in the cache, by the text, the options and the compiler's version.

    Raises:
        BackendError: the compiler doesn't take it.
    """
    from cupy.cuda import nvrtc

    options = (*OPTIONS, f"-arch={architecture}")
    made_of = "\0".join([*map(str, nvrtc.getVersion()), *options, text])
    kept = settings.cache_dir() / "cuda" / f"{hashlib.sha256(made_of.encode()).hexdigest()}.cubin"
    with suppress(OSError):
        return kept.read_bytes()
    code = _compiled(nvrtc, text, options)
    with suppress(OSError), written_whole(kept) as file:  # without a cache it is done anew
        file.write(code)
    return code


def _compiled(nvrtc: ModuleType, text: str, options: tuple[str, ...]) -> bytes:
    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = " ".join(nvrtc.getProgramLog(program).split())
        raise BackendError(
            f"A kernel wasn't compiled ({options[-1]}): {error}: {log} "
            "QTOOL_BACKEND=dense runs the model through torch."
        ) from error
    finally:
        nvrtc.destroyProgram(program)
