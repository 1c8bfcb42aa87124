"""The library of kernels/cpu for this processor: found in the wheel or the cache, else compiled."""

import ctypes
import functools
import threading
from ctypes import CDLL, c_char_p, c_double, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool import resources, settings
from qtool.core.native import building
from qtool.plugins import check_name

PROCESSOR_INFO = Path("/proc/cpuinfo")
POINTER, INTEGER = c_void_p, c_int64
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of dense weights, single rows and caches, by their number in the library."""
SIGNATURES = {
    "qt_fingerprint": (c_char_p, ()),
    "qt_team_borrow": (None, (POINTER, POINTER, POINTER)),
    "qt_planes_size": (INTEGER, (POINTER,)),
    "qt_planes_pack": (None, (POINTER, POINTER, POINTER, POINTER, INTEGER)),
    "qt_planes_rows": (None, (POINTER, POINTER, INTEGER, INTEGER, INTEGER, POINTER, INTEGER)),
    "qt_planes_room": (INTEGER, (POINTER, INTEGER)),
    "qt_planes_multiply": (None, (POINTER, POINTER, INTEGER, POINTER, POINTER, INTEGER)),
    "qt_norm_rows": (
        None,
        (POINTER, POINTER, c_double, INTEGER, INTEGER, INTEGER, POINTER, INTEGER),
    ),
    "qt_gate_rows": (None, (POINTER, POINTER, INTEGER, INTEGER, INTEGER, POINTER, INTEGER)),
    "qt_columns_walk": (None, (POINTER, INTEGER)),
    "qt_group_room": (INTEGER, (INTEGER, INTEGER)),
    "qt_group_solve": (None, (POINTER, INTEGER)),
    "qt_group_equations": (None, (POINTER, INTEGER)),
    "qt_fit_room": (INTEGER, (INTEGER,)),
    "qt_fit_groups": (None, (POINTER, INTEGER)),
    "qt_decode_room": (INTEGER, (POINTER, INTEGER, INTEGER)),
    "qt_decode_step": (None, (POINTER, POINTER, INTEGER)),
}
POOL = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""Of OpenMP, GCC's or LLVM's: what runs a part in each thread, and who a thread is."""
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Library:
    """What is loaded."""

    level: str
    path: Path
    calls: CDLL


def found_library() -> Library | str:
    """Return the library, compiled now if need be; or a sentence that says why there is none.

    Raises:
        UnknownNameError: $QTOOL_CPU_LEVEL isn't a level of this kind of machine.
    """
    level = settings.cpu_level() or best_level()
    check_name(level, tuple(building.instruction_levels()), "levels of instructions")
    with _LOCK:
        return _library(resources.kernels_dir() / "cpu", level, settings.cache_dir() / "native")


def best_level() -> str:
    """Return the level of the instructions that this processor has."""
    flags = _flags(PROCESSOR_INFO.read_text() if PROCESSOR_INFO.exists() else "")
    if not flags and torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
        flags = frozenset(building.NEEDED["avx2"])
    able = (
        n for n in building.instruction_levels() if flags.issuperset(building.NEEDED.get(n, ()))
    )
    return next(able)  # `plain` needs nothing


def _flags(cpu_info: str) -> frozenset[str]:
    """Return what Linux lists of the first processor."""
    lines = (line.partition(":") for line in cpu_info.splitlines())
    found = (value for key, _, value in lines if key.strip() == "flags")
    return frozenset(next(found, "").split())


@functools.cache
def _library(kernels: Path, level: str, cache: Path) -> Library | str:
    """Load a file that was compiled from the text as it is now, or make one."""
    name = building.file_name(kernels, level)
    for path in (resources.native_dir() / name, cache / name):
        loaded = _loaded(path, kernels, level)
        if loaded is not None:
            return loaded
    complaint = building.compile_library(kernels, level, cache / name)
    if complaint is not None:
        return complaint
    loaded = _loaded(cache / name, kernels, level)
    return loaded or f"its library {cache / name} can't be loaded. Remove that file and try again."


def _loaded(path: Path, kernels: Path, level: str) -> Library | None:
    """Load a file; None if there is none, or it is not what its name says."""
    if not path.is_file():
        return None
    try:
        calls = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(calls, name)
            function.restype, function.argtypes = result, arguments
        made_of = calls.qt_fingerprint().decode()
    except (OSError, AttributeError, UnicodeDecodeError):
        return None
    if made_of != building.fingerprint(kernels, level):
        return None
    _share_threads(calls)
    return Library(level, path, calls)


def _share_threads(calls: CDLL) -> None:
    """Give the library torch's own threads: those of two pools would wait awake side by side."""
    try:
        torch_calls = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        pool = [ctypes.cast(getattr(torch_calls, name), c_void_p) for name in POOL]
    except (OSError, AttributeError):
        return  # a torch with other threads than OpenMP's
    calls.qt_team_borrow(*pool)
