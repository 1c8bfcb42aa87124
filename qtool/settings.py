"""The environment variables that change what qtool does; nothing else reads the environment.

Each is read when it is asked for, so that a test or a notebook can set it at any time.
"""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

VARIABLES = {
    "QTOOL_BACKEND": "run quantized layers with this backend; default: the best that can",
    "QTOOL_KERNEL": "run them with this kernel of `cuda`; default: by the measured table",
    "QTOOL_CPU_LEVEL": "instructions that `cpu` uses: avx512, avx2 or plain; default: the best",
    "QTOOL_CPU_TABLES": "of `cpu`: int16, int8 (coarser) or float32 (exact); default: int16",
    "QTOOL_RUNNER": "0: `generate` through transformers' own loop, on a card as well",
    "QTOOL_KV_CACHE": "int8: keep keys and values as int8; default: in the model's dtype",
    "QTOOL_DEPENDENT_LAUNCHES": "0: a kernel begins when the one before it has ended",
    "QTOOL_CACHE": "folder of converted models, answers and scores; default: ~/.cache/qtool",
    "QTOOL_LOG": "debug, info or warning: log to stderr, with tracebacks of errors under debug",
}
"""All of them, and what each does."""
KvCache = Literal["auto", "int8"]
"""How keys and values of a sequence are kept; auto: in the dtype of the model's activations."""
EXECUTION = (
    "QTOOL_BACKEND",
    "QTOOL_KERNEL",
    "QTOOL_CPU_LEVEL",
    "QTOOL_CPU_TABLES",
    "QTOOL_RUNNER",
    "QTOOL_KV_CACHE",
    "QTOOL_DEPENDENT_LAUNCHES",
)
"""Those that change how a model is executed, and so its results."""


def given(names: Iterable[str] = tuple(VARIABLES)) -> dict[str, str]:
    """Return those of the variables that are set, and their values."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def backend() -> str | None:
    """Return the name of the backend to run quantized layers with; None: choose."""
    return os.environ.get("QTOOL_BACKEND") or None


def kernel() -> str | None:
    """Return the name of the kernel that `cuda` is to launch, unchecked; None: choose."""
    return os.environ.get("QTOOL_KERNEL") or None


def cpu_level() -> str | None:
    """Return the instructions that `cpu` is to be compiled for, unchecked; None: the best."""
    return os.environ.get("QTOOL_CPU_LEVEL") or None


def cpu_tables() -> str | None:
    """Return what the tables of `cpu` are to have, unchecked; None: int16."""
    return os.environ.get("QTOOL_CPU_TABLES") or None


def runner_is_off() -> bool:
    """Return whether `generate` is to leave the decode runner alone."""
    return os.environ.get("QTOOL_RUNNER") == "0"


def kv_cache() -> str | None:
    """Return how keys and values are to be kept, unchecked; None: as the command says."""
    return os.environ.get("QTOOL_KV_CACHE") or None


def dependent_launches() -> bool:
    """Return whether a kernel may begin before the one before it has ended."""
    return os.environ.get("QTOOL_DEPENDENT_LAUNCHES", "1") != "0"


def log_level() -> str:
    """Return the level of the log in small letters, unchecked; empty: no log."""
    return os.environ.get("QTOOL_LOG", "").lower()


def cache_dir() -> Path:
    """Return where converted models, digests and scores are kept.

    $QTOOL_CACHE, else $XDG_CACHE_HOME/qtool, else ~/.cache/qtool; for a user without a home, as in
    some containers, a folder for temporary files.
    """
    root, xdg = os.environ.get("QTOOL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root)
    if xdg:
        return Path(xdg) / "qtool"
    try:
        return Path.home() / ".cache" / "qtool"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "qtool-cache"


class LaunchedRank(NamedTuple):
    """What `torchrun` tells each process that it starts."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launched_rank() -> LaunchedRank | None:
    """Return which of the processes that `torchrun` started this one is; None: it wasn't."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    told = [os.environ.get(name, "") for name in names]
    return LaunchedRank(*map(int, told)) if all(map(str.isdecimal, told)) else None
