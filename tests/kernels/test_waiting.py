"""The host notices a kernel that doesn't wait for the launch before it, as every kernel must."""

import functools

import pytest
import torch

from qtool.runtime.backends.cuda import mixed, planes, sources, splits
from qtool.runtime.backends.cuda.classes import by_classes
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels import host
from tests.kernels.host import FAILURES, Recorder

WAIT = "    wait_for_previous();\n"
WRITE = "    y[place] = store_activation(value);\n"


def change(monkeypatch, text):
    """Let kernels be compiled from changed text; those that are there are kept for other tests."""
    source = sources.kernel_source
    monkeypatch.setattr(host, "kernel_source", lambda *given: text(source(*given)))
    monkeypatch.setattr(host, "host_kernels", functools.cache(host.host_kernels.__wrapped__))


def add_splits(monkeypatch, text):
    """Add two splits with a changed kernel, compiled anew."""
    change(monkeypatch, text)
    y = torch.zeros(1, 128, dtype=torch.float16)
    splits.add_splits(torch.ones(2, 1, 128), planes.Target(y), Recorder())
    return y


def test_a_kernel_that_waits_is_fine(monkeypatch):
    assert bool((add_splits(monkeypatch, lambda text: text) == 2).all())


def test_a_kernel_that_never_waits_is_found(monkeypatch):
    with pytest.raises(AssertionError, match=FAILURES[2]):
        add_splits(monkeypatch, lambda text: text.replace(WAIT, ""))


def test_classes_that_never_wait_are_found(monkeypatch):
    scheme = WeightScheme(num_bits=3, group_size=64, rows=((3, 16), (2, 16)))
    tensor = random_tensor("mixed_rows", scheme, Shape2D(32, 256), 1)
    weight = mixed.prepare_weight(tensor, torch.float16)
    assert isinstance(weight, mixed.MixedWeight)
    change(monkeypatch, lambda text: text.replace(WAIT, ""))
    parts = list(zip(weight.classes, weight.places, strict=True))
    y = torch.zeros(64, dtype=torch.float16)[32:].view(1, 32)  # places that are hidden are -1
    with pytest.raises(AssertionError, match=FAILURES[2]):
        by_classes(normal(1, 256).half(), parts, y, Recorder(), Card(2, 144 * 1024))


def test_a_kernel_that_reads_and_writes_before_it_waits_is_found(monkeypatch):
    with pytest.raises(AssertionError, match=FAILURES[3]):
        add_splits(monkeypatch, lambda text: text.replace(WAIT, "").replace(WRITE, WRITE + WAIT))
