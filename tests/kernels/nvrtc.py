"""Compile CUDA C++ to machine code with NVRTC, which needs no card; skips where it isn't there."""

import ctypes
import functools
import importlib.metadata
import re
from dataclasses import dataclass

import pytest

PACKAGE = "nvidia-cuda-nvrtc"
USED = re.compile(r"Used (\d+) registers")
SPILLED = re.compile(r"(\d+) bytes spill stores")


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    registers: int
    """Of the hungriest kernel in the file."""
    spilled: int
    """Bytes, of all kernels in the file."""
    log: str
    """What the compiler said."""


@functools.cache
def library() -> ctypes.CDLL:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} isn't installed: kernels can't be compiled for a card")
    (path,) = [f for f in files if re.fullmatch(r"libnvrtc\.so\.\d+", f.name)]
    return ctypes.CDLL(str(path.locate()))


AS_CUPY = "--ftz=true"
"""What CuPy, which compiles kernels for most cards, adds to the options of its callers."""


def options_for(architecture: str) -> list[str]:
    """Return how kernels are compiled for a card: those of `sm_90a` without CuPy."""
    cupy = [] if architecture.endswith("a") else [AS_CUPY]
    return [f"--gpu-architecture={architecture}", "--std=c++17", *cupy]


def compile_for(architecture: str, source: str) -> Compiled:
    """Return what the compiler made of a source; fails with its log if it made nothing."""
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [*options_for(architecture), "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    assert status == 0, text
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    registers = [int(number) for number in USED.findall(text)]
    assert registers, text
    return Compiled(cubin.raw, max(registers), sum(map(int, SPILLED.findall(text))), text)


def ptx_of(architecture: str, source: str) -> str:
    """Return the instructions that the compiler makes machine code of, as CuPy has it made."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = options_for(architecture)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert nvrtc.nvrtcCompileProgram(program, len(options), array) == 0
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return text.value.decode()
