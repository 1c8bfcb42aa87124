"""What pieces of work take: time, memory of the process, memory of a card."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.checkpoint.place import nearest
from qtool.steps.memory import peak_memory

STATM, MEMINFO = Path("/proc/self/statm"), Path("/proc/meminfo")
CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Of a container, by the version of its control groups."""
SECONDS_BETWEEN_LOOKS = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """What one piece of work took."""

    seconds: float = 0.0
    """By the clock on the wall."""
    cpu_seconds: float = 0.0
    """Of all threads together: what others do on the machine changes it less."""
    memory_bytes: int = 0
    """Peak of the process while it lasted, with all that was there before."""
    card_bytes: int = 0
    """Peak of what torch had of the card; 0 without one."""

    def __add__(self, other: "Usage") -> "Usage":
        """Return one after the other."""
        return Usage(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.memory_bytes, other.memory_bytes),
            max(self.card_bytes, other.card_bytes),
        )

    def __sub__(self, other: "Usage") -> "Usage":
        """Return what it took more than another; its peaks stay."""
        return Usage(
            max(self.seconds - other.seconds, 0.0),
            max(self.cpu_seconds - other.cpu_seconds, 0.0),
            self.memory_bytes,
            self.card_bytes,
        )

    def __mul__(self, times: float) -> "Usage":
        """Return the same several times over, one after the other."""
        return Usage(
            self.seconds * times, self.cpu_seconds * times, self.memory_bytes, self.card_bytes
        )


NO_USE = Usage()


@dataclass(frozen=True, slots=True)
class MachineRoom:
    """What there is for a run, in bytes."""

    memory_bytes: int
    """For the process: what it has, and what is available beside it."""
    card_bytes: int
    """Likewise of the card; 0 without one."""
    disk_bytes: int
    """Free where the result goes."""


class Meter:
    """Measures pieces of work by their name."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._found: dict[str, list[Usage]] = {}
        self.last = ""
        """What is measured, or was last."""

    def mean(self, name: str) -> Usage:
        """Return what one piece of work of that name took, with the peak of all of them."""
        found = self._found.get(name, [NO_USE])
        return sum(found, NO_USE) * (1 / len(found))

    def names(self) -> set[str]:
        """Return what was measured."""
        return set(self._found)

    @contextlib.contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Measure what is done inside the block."""
        self.last, on_card = name, self._device.startswith("cuda")
        if on_card:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        before, begun, cpu = peak_memory("cpu"), time.perf_counter(), time.process_time()
        with _watching() as seen:
            yield
            if on_card:
                torch.cuda.synchronize(self._device)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
        after = peak_memory("cpu")
        peak = after if after > before or not seen else max(seen)  # a new peak: known exactly
        card = peak_memory(self._device) if on_card else 0
        self._found.setdefault(name, []).append(Usage(seconds, cpu_seconds, peak, card))


@contextlib.contextmanager
def _watching() -> Iterator[list[int]]:
    """Look at the memory of the process again and again; nothing is seen where nobody says it."""
    seen = [resident()] if STATM.exists() else []
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(SECONDS_BETWEEN_LOOKS):
            seen[0] = max(seen[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    if seen:
        watcher.start()
    try:
        yield seen
    finally:
        stopped.set()
        if seen:
            watcher.join()
            seen[0] = max(seen[0], resident())


def resident() -> int:
    """Return what the process has of the memory now, in bytes; its peak where nobody says more."""
    if not STATM.exists():
        return peak_memory("cpu")
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine_room(device: str, out_dir: Path) -> MachineRoom:
    """Return what a run would have of the machine now, its process included."""
    card = 0
    if device.startswith("cuda"):
        card = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = shutil.disk_usage(nearest(out_dir.absolute().parent)).free
    return MachineRoom(_host_bytes(), card, free)


def _host_bytes() -> int:
    """Return what the process may take: what is available, and no more than a container's limit."""
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = MEMINFO.read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        bounds.append(int(line.split()[1]) * 1024 + resident())
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            bounds.append(int(file.read_text()))
    return min(bounds)
