"""A card that isn't there: calls run on the CPU, launches do nothing, times are invented."""

import itertools

import torch

from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.decode.torch_ops import TorchOps
from qtool.scheme import Shape2D
from qtool.timing import gpu
from qtool.timing.kernels import Rig
from qtool.timing.machine import Clock, Machine
from qtool.timing.shapes import DecoderSizes, LinearShape, ModelShape

L2_BYTES = 1000
COPY_BANDWIDTH = 1e9
MACHINE = Machine("Imagined 1", 132, 80 * 10**9, L2_BYTES, "2.13", "13.0", "580.1", 1755, 1980, 700)
TINY = ModelShape(
    (
        LinearShape("qkv", Shape2D(128, 64), 2),
        LinearShape("o", Shape2D(64, 64), 2),
        LinearShape("gate_up", Shape2D(256, 64), 2),
        LinearShape("down", Shape2D(64, 128), 2),
        LinearShape("lm_head", Shape2D(96, 64), 1, 4),
    ),
    DecoderSizes(
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        rope_theta=10_000.0,
    ),
)


class CountingTimer:
    """Runs every call once and says that each took a microsecond per call."""

    def __init__(self):
        self.calls = []

    def __call__(self, calls):
        for call in calls:
            call()
        self.calls.append(len(calls))
        return [9.0, len(calls) * 1e-6, 0.0]


class FakeClock(Clock):
    """A second passes at each look; memory grows by a gigabyte."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self._time, self._memory = itertools.count(), itertools.count()

    def seconds(self):
        return float(next(self._time))

    def memory(self):
        return next(self._memory) * 10**9

    def peak_memory(self):
        return next(self._memory) * 10**9


def rig(timer=None):
    """Return a rig on the CPU."""
    return Rig(
        device=torch.device("cpu"),
        timer=timer or CountingTimer(),
        launch=lambda _call, _tensors: None,
        card=Card(multiprocessors=2, shared_bytes=227 * 1024),
        l2_bytes=L2_BYTES,
        copy_bandwidth=COPY_BANDWIDTH,
    )


def bench():
    """Return all of a card."""
    return gpu.Bench(rig(), TorchOps(), FakeClock(), lambda: MACHINE)
