"""Sums over ranks by a kernel that writes into other cards' memory.

NCCL's all-reduce of 16 KB takes several times as long as these bytes travel, twice per block.
"""

import functools
import logging

import torch
from torch import Tensor

from qtool.runtime.backends.cuda import peer_memory
from qtool.runtime.backends.cuda.launch import KERNEL_DTYPES, KernelCall, Launch, constants
from qtool.runtime.decode.parallel import Sum
from qtool.runtime.tensor_parallel import TensorParallel

_LOG = logging.getLogger(__name__)
THREADS = 256
PER_THREAD = 4
PER_BLOCK = THREADS * PER_THREAD
MOST_BLOCKS = 128
"""All of them wait for other cards at once, so all must have a place on this one."""
MOST_ROUNDS = 32
"""Of a block; beyond, NCCL moves the bytes faster than these come and go."""
MOST_RANKS = 8
SLOT_BYTES = 2 * 16
"""Of a thread and a sender, in a box: two rounds."""


class PeerSum:
    """The sum over ranks; of very many numbers by the group's own."""

    def __init__(self, group: TensorParallel, launch: Launch, boxes: Tensor) -> None:
        """Begin at round 0, on all ranks.

        Args:
            group: The ranks.
            launch: Runs kernels.
            boxes: (ranks,) int64, addresses of `box_bytes` zeros that this rank may write to.
        """
        self._group, self._launch, self._boxes = group, launch, boxes
        self._rounds = torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=boxes.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum of x (tokens, features), the same bits on all ranks."""
        count, group = x.numel(), self._group
        blocks = min(-(-count // PER_BLOCK), MOST_BLOCKS)
        most = MOST_ROUNDS * MOST_BLOCKS * PER_BLOCK
        if count % PER_THREAD or not 0 < count <= most or x.dtype not in KERNEL_DTYPES:
            return group.all_reduce(x)
        macros, numbers = constants(x.dtype, RANKS=group.world_size), (group.rank, count)
        call = KernelCall("peer_sum", "peer_sum", macros, (blocks, 1, 1), THREADS, 0, numbers)
        y = torch.empty_like(x)
        self._launch(call, (x, y, self._boxes, self._rounds))
        return y


def box_bytes(ranks: int) -> int:
    """Return the size of what each rank's peers write to."""
    return MOST_BLOCKS * THREADS * ranks * SLOT_BYTES


@functools.cache
def sum_over_peers(group: TensorParallel, launch: Launch) -> Sum:
    """Return what sums over ranks; the group's own where cards don't see each other's memory.

    Every rank calls it, and all get the same.
    """
    if group.world_size > MOST_RANKS:
        return group.all_reduce
    addresses = peer_memory.shared_zeros(group, box_bytes(group.world_size))
    if isinstance(addresses, str):
        _LOG.info("sums over ranks go through NCCL: %s", addresses)
        return group.all_reduce
    boxes = torch.tensor(addresses, dtype=torch.int64, device=group.device)
    return PeerSum(group, launch, boxes)
