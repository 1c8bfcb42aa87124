"""The host notices a kernel that doesn't wait for the launch before it, as every kernel must."""

import pytest
import torch

from qtool.runtime.backends.cuda import planes, sources
from tests.kernels import host
from tests.kernels.host import FAILURES, Recorder

WAIT = "    wait_for_previous();\n"
WRITE = "    y[place] = store_activation(value);\n"


def add_splits(monkeypatch, text):
    """Add two splits with a changed kernel, compiled anew."""
    source = sources.kernel_source
    monkeypatch.setattr(host, "kernel_source", lambda *given: text(source(*given)))
    host.host_kernels.cache_clear()
    try:
        y = torch.zeros(1, 128, dtype=torch.float16)
        planes.add_splits(torch.ones(2, 1, 128), planes.Target(y), Recorder())
    finally:
        host.host_kernels.cache_clear()
    return y


def test_a_kernel_that_waits_is_fine(monkeypatch):
    assert bool((add_splits(monkeypatch, lambda text: text) == 2).all())


def test_a_kernel_that_never_waits_is_found(monkeypatch):
    with pytest.raises(AssertionError, match=FAILURES[2]):
        add_splits(monkeypatch, lambda text: text.replace(WAIT, ""))


def test_a_kernel_that_reads_and_writes_before_it_waits_is_found(monkeypatch):
    with pytest.raises(AssertionError, match=FAILURES[3]):
        add_splits(monkeypatch, lambda text: text.replace(WAIT, "").replace(WRITE, WRITE + WAIT))
