"""What the driver is given for a launch, by a driver that isn't there."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.errors import BackendError
from qtool.runtime.backends.cuda import driver as cuda_driver
from qtool.runtime.backends.cuda.launch import KernelCall

CALL = KernelCall("file", "kernel", (), (5, 2, 3), 96, 1000, (7, 0.5, -1), zeros=11)


class Driver:
    """Reads what it is given, as the driver does, before it returns."""

    def __init__(self) -> None:
        self.status = 0
        self.seen: list[SimpleNamespace] = []
        self.allowed: list[tuple[int, int]] = []

    def cuLaunchKernelEx(self, config, function, arguments, _extra):  # noqa: N802 - the driver's name
        given = config._obj
        kinds: list[Any] = [ctypes.c_void_p] * 3 + [ctypes.c_int, ctypes.c_float, ctypes.c_int]
        seen = SimpleNamespace(
            grid=tuple(given.grid),
            block=tuple(given.block),
            shared=given.shared_bytes,
            stream=given.stream,
            function=function.value,
            values=[k.from_address(p).value for k, p in zip(kinds, arguments, strict=True)],
            attributes=[given.attributes[i].id for i in range(given.num_attributes)],
        )
        self.seen.append(seen)
        return self.status

    def cuFuncSetAttribute(self, _function, name, value):  # noqa: N802
        self.allowed.append((name, value))
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: made)
    monkeypatch.setattr(cuda_driver, "compiled_function", lambda *_: 1234)
    monkeypatch.setattr(cuda_driver, "_has_dependent_launches", lambda _: True)
    monkeypatch.setattr(cuda_driver, "_ALLOWED", {})
    return made


def test_every_launch_has_its_own_pointers_and_stream(driver):
    prepared = cuda_driver._PreparedCall(CALL, 0, 2)
    prepared.launch([64, 0, 128], 9)
    prepared.launch([32, 16, 8], 0)
    first, second = driver.seen
    assert first.values == [64, None, 128, 7, 0.5, -1]
    assert second.values == [32, 16, 8, 7, 0.5, -1]
    assert (first.stream, second.stream) == (9, None)
    assert (first.grid, first.block, first.shared) == ((5, 2, 3), (96, 1, 1), 1000)
    assert first.function == second.function == 1234
    assert first.attributes == [cuda_driver.STREAM_SERIALIZATION]
    assert driver.allowed[0] == (8, 1000)


def test_ctas_that_wait_for_one_another_are_there_together_or_not_at_all(driver):
    cuda_driver._PreparedCall(CALL._replace(together=True), 0, 2).launch([1, 2, 3], 0)
    wanted = [cuda_driver.STREAM_SERIALIZATION, cuda_driver.COOPERATIVE]
    assert driver.seen[0].attributes == wanted


def test_a_launch_that_makes_a_weight_ahead_is_not_dependent(driver):
    cuda_driver._PreparedCall(CALL._replace(dependent=False), 0, 2).launch([1, 2, 3], 0)
    assert driver.seen[0].attributes == []


def test_a_launch_that_is_refused_says_what_it_was(driver):
    driver.status = 701
    with pytest.raises(BackendError, match=r"kernel wasn't launched: CUDA error 701, grid \(5, 2"):
        cuda_driver._PreparedCall(CALL, 0, 2).launch([1, 2, 3], 0)


def test_tensors_that_are_not_on_one_card_are_refused():
    with pytest.raises(BackendError, match="not of cpu, meta"):
        cuda_driver.launch(CALL, (torch.empty(1), None, torch.empty(1, device="meta")))
