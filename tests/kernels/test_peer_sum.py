"""Sums over ranks by the kernel: two processes that write into each other's memory."""

import pytest
import torch

from qtool.runtime.backends.cuda import peer_sum
from qtool.runtime.backends.cuda.peer_sum import (
    MOST_BLOCKS,
    MOST_ROUNDS,
    PER_BLOCK,
    PeerSum,
    box_bytes,
)
from qtool.runtime.tensor_parallel import TensorParallel
from tests.helpers import normal
from tests.kernels.host import Recorder, host_kernels
from tests.runtime_decode.ranks import on_ranks

SIZES = ((1, 64), (3, 1500), (1, 8), (2, 64))


def inputs(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [normal(*size, seed=10 * index + rank).to(dtype) for index, size in enumerate(SIZES)]


def sums(
    group: TensorParallel, boxes: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    peer_sum.MOST_BLOCKS = 2  # in this process, which ends: so that a block has several rounds
    recorder = Recorder()
    addresses = torch.tensor([box.data_ptr() for box in boxes])
    add = PeerSum(group, recorder, addresses)
    found = [add(x) for x in inputs(group.rank, dtype)]
    assert recorder.names == ["peer_sum"] * len(SIZES)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_are_rounded_once_and_alike_on_all_ranks(ranks, dtype):
    bf16 = (("ACTIVATION_BF16", 1),) if dtype == torch.bfloat16 else ()
    host_kernels("peer_sum", (*bf16, ("RANKS", ranks)))  # compiled before there are processes
    boxes = [torch.zeros(box_bytes(ranks) // 8, dtype=torch.int64) for _ in range(ranks)]
    shared = [box.share_memory_() for box in boxes]
    found = on_ranks(sums, shared, dtype, count=ranks)
    for mine in found:
        for index, y in enumerate(mine):
            wide = torch.stack([inputs(rank, dtype)[index].float() for rank in range(ranks)])
            assert torch.equal(y, wide.sum(0).to(dtype))
            assert torch.equal(y, found[0][index])


def test_many_tokens_go_through_the_group():
    class Group(TensorParallel):
        def all_reduce(self, x):
            return x + 1

    add = PeerSum(Group(0, 2, torch.device("cpu")), Recorder(), torch.zeros(2, dtype=torch.int64))
    wide = torch.zeros(MOST_ROUNDS * MOST_BLOCKS, PER_BLOCK + 8, dtype=torch.float16)
    odd = torch.zeros(1, 3, dtype=torch.float16)
    for x in (wide, odd, torch.zeros(1, 4)):
        assert torch.equal(add(x), x + 1)
