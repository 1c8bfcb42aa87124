"""By how many threads the library runs: as many as torch, but none without a core of its own."""

import functools
import math
import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def library_threads() -> int:
    """Return the number: what torch was told ($OMP_NUM_THREADS, `set_num_threads`), within limits.

    Limits are the cores that this process may run on and the share of them that its control group
    has.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(torch.get_num_threads(), allowed or 1, _quota()))


@functools.cache
def _quota() -> int:
    """Return how many cores the control group of this process pays for; it rarely changes."""
    return cores_of(CGROUP)


def cores_of(group: Path) -> int:
    """Return how many cores a control group's folder, of version 2 or 1, allows, rounded up."""
    try:
        words = (group / "cpu.max").read_text().split()
    except OSError:
        words = []
    try:
        if not words:
            folder = group / "cpu"
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [(folder / name).read_text().strip() for name in names]
        quota, period = int(words[0]), int(words[1])
    except (OSError, ValueError, IndexError):  # "max": no limit
        return 2**31
    return math.ceil(quota / period) if quota > 0 and period > 0 else 2**31
