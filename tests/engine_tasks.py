"""Functions that workers call in tests; they find them by this module's name."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from qtool.errors import MethodError


def squared(number: int) -> int:
    time.sleep(0.01 * (number % 3))  # so that they don't end in order
    return number * number


def when(_number: int) -> float:
    began = time.monotonic()
    time.sleep(0.05)
    return began


def marked(asked: tuple[str, float]) -> None:
    marker, seconds = asked
    Path(marker).touch()
    time.sleep(seconds)


def who(_number: int) -> int:
    return os.getpid()


def summed(shared: Any) -> tuple[float, torch.dtype, tuple[int, ...]]:
    value = shared.get()
    return float(value.sum()), value.dtype, tuple(value.shape)


def twice(value: torch.Tensor) -> torch.Tensor:
    return 2 * value


def device_of(value: torch.Tensor) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return value.device.type, value.dtype, tuple(value.shape)


def refused(name: str) -> None:
    raise MethodError(f"{name} is refused.", layer=name)


def full(_name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_at_first(marker: str) -> str:
    """Find the disk full the first time that it is called."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return "room"
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_at_first(marker: str) -> str:
    """End the worker as the kernel would, the first time that it is called."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return "alive"
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def always_killed(_name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
