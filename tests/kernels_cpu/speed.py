"""How fast packed weights are multiplied, beside what as many threads read.

`python -m tests.kernels_cpu.speed`. Rounds alternate, the fastest of each counts; a machine that
others use gives nonsense for two threads.
"""

import sys
import threading
import time
from collections.abc import Callable

import torch

from qtool.runtime.backends._choose import load_backend
from qtool.runtime.backends.cpu.packing import PackedWeight
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor

SHAPE, ROUNDS, STREAM_BYTES = Shape2D(4096, 4096), 25, 120_000_000


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def read(streams: list[torch.Tensor], count: int) -> None:
    """Read all streams by that many threads, each a part."""
    parts = [stream.chunk(count) for stream in streams]
    readers = [
        threading.Thread(target=lambda i=i: [part[i].sum() for part in parts])
        for i in range(1, count)
    ]
    for reader in readers:
        reader.start()
    for part in parts:
        part[0].sum()
    for reader in readers:
        reader.join()


def measure(num_bits: int, count: int) -> str:
    """Return a line for a width and a number of threads."""
    scheme = WeightScheme(num_bits=num_bits, group_size=128)
    tensor, x = random_tensor("binary_coding", scheme, SHAPE, 0), torch.randn(1, SHAPE.in_features)
    first = load_backend("cpu").prepare(tensor, torch.float32)
    assert isinstance(first, PackedWeight)
    copies = STREAM_BYTES // first.num_bytes
    weights = [load_backend("cpu").prepare(tensor, torch.float32) for _ in range(copies)]
    buffers = [torch.ones(first.num_bytes // 8, dtype=torch.int64) for _ in range(copies)]
    found = {"read": 1e9, "tables": 1e9}
    torch.set_num_threads(1)  # of a sum
    for _ in range(ROUNDS):
        found["read"] = min(found["read"], seconds(lambda: read(buffers, count)))
        torch.set_num_threads(count)
        spent = seconds(lambda: [each.multiply(x) for each in weights])
        torch.set_num_threads(1)
        found["tables"] = min(found["tables"], spent)
    rates = {what: copies * first.num_bytes / spent / 1e9 for what, spent in found.items()}
    share = rates["tables"] / rates["read"]
    return (
        f"{num_bits} planes, {count} threads: {rates['tables']:.1f} GB/s, {share:.0%} of "
        f"{rates['read']:.1f} GB/s read"
    )


if __name__ == "__main__":
    for width in (1, 2, 3, 4):
        for thread_count in (1, 2):
            sys.stdout.write(measure(width, thread_count) + "\n")
