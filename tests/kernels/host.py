"""Compile a kernel's own text for the CPU with host.h and host.cpp, and call it with tensors."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.runtime.backends.cuda.launch import KernelCall
from qtool.runtime.backends.cuda.sources import kernel_source

HERE = Path(__file__).parent
KERNEL = re.compile(
    r'extern "C" __global__\s+void\s*(?:CLUSTERED\s*)?(?:__launch_bounds__\([\w, ]+\)\s*)?'
    r"(\w+)\((.*?)\)\s*\{",
    re.S,
)
NAME = re.compile(r"\w+")
NUMBER = re.compile(r"_\d+$")  # of a class, where a kernel takes several weights
ALIAS = re.compile(r"#define KERNEL (\w+)")
TOGETHER = "blocks of the grid have to run at once"
"""In the text of a kernel whose blocks wait for later ones."""
COMMENT = re.compile(r"//[^\n]*")
# Any optimization takes longer than it saves: most libraries run a few small launches.
FLAGS = ("-O0", "-w", "-fPIC", "-std=c++17", "-ffp-contract=off")


def compiler() -> str:
    """Return the C++ compiler, or skip: the kernels are then checked by NVRTC alone."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++ to compile kernels for the CPU with")
    return found


def compiled(*arguments: str | Path) -> None:
    """Call the compiler; fails with what it says."""
    command = [compiler(), *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def host_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with host.h and host.so, compiled: they take longer than a kernel itself.

    All kernels share the one library: the stacks of a thousand fibers are 64 MB.
    """
    folder = tempfile.TemporaryDirectory()
    header = Path(shutil.copy(HERE / "host.h", folder.name))
    compiled("-x", "c++-header", header, "-o", f"{header}.gch")
    compiled("-shared", HERE / "host.cpp", "-o", Path(folder.name) / "host.so")
    return folder


CONSTANTS = frozenset(
    (
        *("planes", "scales", "offsets", "weight", "bias", "order"),
        *("query_norm", "key_norm", "norm", "rotary"),
    )
)
"""Names of what a kernel may read before the launch before it has ended."""
FAILURES = {
    1: "threads wait for one another for ever",
    2: "a block never waits for the launch before it",
    3: "it writes before it has waited for the launch before it",
}


class HostKernel:
    """One kernel of a library."""

    def __init__(self, library: ctypes.CDLL, name: str, parameters: list[str]) -> None:
        self._library, self._parameters = library, parameters
        self._function = getattr(library, f"launch_{name}")

    def __call__(self, grid, threads: int, shared: int, *arguments: Tensor | float | None) -> None:
        """Run it to the end; raises where threads hang, or touch what they have to wait for.

        Inputs hold other bytes until a block has waited, so results are wrong if it doesn't.
        """
        assert len(arguments) == len(self._parameters), self._parameters
        values: list[Any] = [ctypes.c_int(value) for value in (*grid, threads)]
        values.append(ctypes.c_size_t(shared))
        for argument, parameter in zip(arguments, self._parameters, strict=True):
            values.append(_value(argument, parameter))
        self._hide(arguments)
        status = self._function(*values)
        self._library.host_forget()
        assert status == 0, FAILURES[status]

    def uneven(self, seed: int) -> None:
        """Let some warps be slower from now on, which: by the seed; 0: none."""
        self._library.host_uneven(ctypes.c_uint(seed))

    def _hide(self, arguments: Sequence[Any]) -> None:
        for argument, parameter in zip(arguments, self._parameters, strict=True):
            name = NUMBER.sub("", NAME.findall(parameter)[-1])
            is_constant = parameter.startswith("const") and name in CONSTANTS
            if isinstance(argument, Tensor) and not is_constant:
                size = ctypes.c_size_t(_span(argument) * argument.element_size())
                place, is_output = ctypes.c_void_p(argument.data_ptr()), "const" not in parameter
                self._library.host_region(place, size, int(is_output))


def _span(tensor: Tensor) -> int:
    """Return how many elements lie from the first to the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((count - 1) * stride for count, stride in steps) if tensor.numel() else 0


def _value(argument: Any, parameter: str):
    if isinstance(argument, Tensor):
        assert "*" in parameter, parameter
        assert argument.is_contiguous() or parameter.endswith("*y"), parameter  # columns of more
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


@functools.cache
def host_kernels(name: str, constants: tuple[tuple[str, int], ...]) -> dict[str, HostKernel]:
    """Return all kernels of kernels/NAME.cu, compiled with these constants."""
    source = kernel_source(name, dict(constants))
    for alias in ALIAS.findall(source):
        source = source.replace("KERNEL(", f"{alias}(")
    found = {
        kernel: [part.strip() for part in COMMENT.sub("", parameters).split(",")]
        for kernel, parameters in KERNEL.findall(source)
    }
    cluster = "grid_x" if TOGETHER in source else dict(constants).get("CLUSTER", 1)
    glue = "".join(_glue(kernel, cluster, parameters) for kernel, parameters in found.items())
    text = '#include "host.h"\n' + source.replace('extern "C" __global__', "__global__")
    with tempfile.TemporaryDirectory() as directory:
        file, library = Path(directory) / "kernel.cpp", Path(directory) / "kernel.so"
        file.write_text(text + glue)
        host = Path(host_folder().name)
        compiled("-shared", "-I", host, file, host / "host.so", "-o", library)
        loaded = ctypes.CDLL(str(library))
    return {name: HostKernel(loaded, name, parts) for name, parts in found.items()}


def _glue(kernel: str, cluster: int | str, parameters: list[str]) -> str:
    names = ", ".join(re.split(r"[\s*]+", parameter)[-1] for parameter in parameters)
    return (
        f'extern "C" int launch_{kernel}(int grid_x, int grid_y, int grid_z, int n, size_t bytes, '
        f"{', '.join(parameters)}) {{\n"
        "    dim3 grid{(unsigned)grid_x, (unsigned)grid_y, (unsigned)grid_z};\n"
        f"    return host::launch_kernel(grid, {cluster}, n, bytes, {kernel}, {names});\n}}\n"
    )


class Recorder:
    """Launches on the CPU and notes what."""

    def __init__(self, seed: int = 0) -> None:
        """Run warps in turn; with a seed, some of them slower."""
        self.calls: list[KernelCall] = []
        self.tensors: list[Sequence[Tensor | None]] = []
        self._seed = seed

    def __call__(self, call: KernelCall, tensors: Sequence[Tensor | None]) -> None:
        """Run a kernel; what it must leave as zeros has to be zeros."""
        self.calls.append(call)
        self.tensors.append(tensors)
        kernel = host_kernels(call.file, call.constants)[call.kernel]
        zeros = [torch.zeros(call.zeros, dtype=torch.int64)] if call.zeros else []
        kernel.uneven(self._seed)
        kernel(call.grid, call.threads, call.shared_bytes, *tensors, *zeros, *call.numbers)
        kernel.uneven(0)
        assert not any(bool(zero.any()) for zero in zeros)

    @property
    def names(self) -> list[str]:
        """Return the kernels, in the order of their launches."""
        return [call.kernel for call in self.calls]
