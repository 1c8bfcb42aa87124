"""The processor: what it is, and how fast its cores read memory together."""

import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.core.threads import num_threads

BANDWIDTH_FLOATS = 2**26
"""Of a buffer that no cache holds, 256 MiB."""
READS = 7
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Processor:
    """What numbers of a run hold for."""

    name: str
    cores: int
    """That this process may use."""
    isa: str
    """The widest vectors that torch found."""
    torch: str
    read_bandwidth: dict[int, float]
    """Bytes per second by number of threads, median of reads of a buffer that no cache holds."""


def usable_cores() -> int:
    """Return how many cores this process may run on at once, and torch would use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, torch.get_num_threads()))


def thread_counts(cores: int) -> list[int]:
    """Return the numbers of threads to time: powers of two, and all cores."""
    return [*(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


def describe_processor(counts: list[int]) -> Processor:
    """Return what the processor is and reads, by so many threads."""
    name = processor_name(CPU_INFO.read_text() if CPU_INFO.exists() else "")
    buffer = torch.ones(BANDWIDTH_FLOATS)
    bandwidth = {count: _read_bandwidth(buffer, count) for count in counts}
    isa = torch.backends.cpu.get_cpu_capability()
    return Processor(name, max(counts), isa, torch.__version__, bandwidth)


def processor_name(cpu_info: str) -> str:
    """Return the name that Linux has for it, or Python's."""
    lines = (line.partition(":") for line in cpu_info.splitlines())
    names = (value.strip() for key, _, value in lines if key.strip() == "model name")
    return next(names, "") or platform.processor() or platform.machine()


def _read_bandwidth(buffer: torch.Tensor, threads: int) -> float:
    """Return bytes per second of a sum over a buffer, which waits for memory alone."""
    with num_threads(threads):
        seconds = []
        for _ in range(READS):
            begin = time.perf_counter()
            buffer.sum()
            seconds.append(time.perf_counter() - begin)
    return buffer.nbytes / statistics.median(seconds[1:])
