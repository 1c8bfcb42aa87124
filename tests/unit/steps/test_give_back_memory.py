"""Memory that was freed is there for others."""

import platform
import resource
import sys
from pathlib import Path

import pytest

from qtool.steps.memory import give_back_memory


def test_freed_memory_goes_back_to_the_system():
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be asked for it")
    blocks = [bytearray(64 << 10) for _ in range(2000)]  # below what has pages of its own
    kept = blocks[::200]
    full = resident()
    del blocks
    give_back_memory()
    assert kept
    assert resident() < full - (100 << 20)


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * resource.getpagesize()
