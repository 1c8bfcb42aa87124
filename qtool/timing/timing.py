"""The measuring protocol: replays of a CUDA graph over weights that the L2 cache doesn't hold.

Everything but `CudaTimer` is arithmetic and runs without a card.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Timed = Callable[[], object]
Weight = TypeVar("Weight")
First = TypeVar("First")
WARM_UPS, REPLAYS = 5, 15
COLD_FACTOR = 3
"""Distinct weight bytes per replay, in sizes of the L2 cache."""
LEAST_COPIES = 2
LEAST_CALLS = 20
"""Per replay: the launch of the graph itself, a few microseconds, is divided by it."""
BANDWIDTH_BYTES = 2**30
COPIES_PER_REPLAY = 4


Timer = Callable[[Sequence[Timed]], Sequence[float]]
"""Runs all calls, one after another and many times; returns the seconds of each time."""


class CudaTimer:
    """Replays of one CUDA graph, timed by events on the card's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # one: kernels keep zeroed memory per stream

    def __call__(self, calls: Sequence[Timed]) -> Sequence[float]:
        """Return the seconds of each replay after the warm-ups."""
        with torch.cuda.device(self.device):
            graph = self._capture(calls)
            for _ in range(WARM_UPS):
                graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * REPLAYS)]
            pairs = list(zip(events[::2], events[1::2], strict=True))
            for start, end in pairs:
                start.record()
                graph.replay()
                end.record()
            torch.cuda.synchronize()
            return tuple(start.elapsed_time(end) / 1e3 for start, end in pairs)

    def _capture(self, calls: Sequence[Timed]) -> torch.cuda.CUDAGraph:
        """Run all calls once, which compiles and tunes kernels, then record them."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for call in calls:
                call()
        return graph


def time_calls(calls: Sequence[Timed], timer: Timer) -> float:
    """Return the seconds of one call: the median over the replays, divided by their number."""
    return statistics.median(timer(calls)) / len(calls)


def time_tokens(
    prefill: Callable[[], First],
    decode: Callable[[First], object],
    now: Callable[[], float],
    repeats: int,
) -> tuple[float, float]:
    """Return the median seconds of a prompt, and of the tokens after it; a first run warms up."""
    prefills, decodes = [], []
    for _ in range(repeats + 1):
        started = now()
        first = prefill()
        prefilled = now()
        decode(first)
        prefills.append(prefilled - started)
        decodes.append(now() - prefilled)
    return statistics.median(prefills[1:]), statistics.median(decodes[1:])


def copies_needed(weight_bytes: int, l2_bytes: int) -> int:
    """Return how many distinct copies of a weight keep the L2 cache cold."""
    return max(LEAST_COPIES, -(-COLD_FACTOR * l2_bytes // weight_bytes))


def rotation(copies: Sequence[Weight]) -> list[Weight]:
    """Return the copies in turn, each equally often, for one replay."""
    return list(copies) * -(-LEAST_CALLS // len(copies))


def clones(value: Weight, weight_bytes: int, l2_bytes: int) -> list[Weight]:
    """Return a weight and as many clones of it as a cold cache takes."""
    count = copies_needed(weight_bytes, l2_bytes) - 1
    return [value, *(copy.deepcopy(value) for _ in range(count))]


def copies(device: torch.device, num_bytes: int = BANDWIDTH_BYTES) -> Timed:
    """Return a call that copies random bytes within the device's memory, by a kernel.

    A copy proper is a memory node in a graph, which an H100 runs a sixth slower than outside.
    """
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return lambda: torch.bitwise_or(source, 0, out=target)


def copy_bandwidth(device: torch.device, timer: Timer, num_bytes: int = BANDWIDTH_BYTES) -> float:
    """Return the bytes per second, read and written, of a copy within the device's memory."""
    calls = [copies(device, num_bytes)] * COPIES_PER_REPLAY
    return 2 * num_bytes / time_calls(calls, timer)
