"""Processes that share each layer of one model, one process a card, all on one host.

Every process is a rank of one `TensorParallel`: each has a part of the rows or columns of the
linears, and the same activations between them.
"""

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtool import settings
from qtool.errors import BackendError
from qtool.runtime.watched_ranks import RankWatch

LEAVE_SECONDS = 5
NOTICE_SECONDS = 1
"""For the watch to say that a rank has ended, before the error that follows is told."""
COLLECTIVE_TIMEOUT, LEADER_TIMEOUT = timedelta(minutes=10), timedelta(days=365)
"""For ranks to meet, and for one another's devices; and for what rank 0 has to tell."""

_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Under its name since torch 2.13, and before."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorParallel:
    """This process among those that share a model."""

    rank: int
    world_size: int
    device: torch.device
    """Where this rank's part is."""

    @property
    def leads(self) -> bool:
        """Return whether this rank speaks for all: it writes files and answers requests."""
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of `x`, in its place; the same bits on all of them."""
        with _said(self):
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return what ranks have of (..., own size) side by side: (..., sum of `sizes`)."""
        most = max(sizes)
        if x.shape[-1] < most:
            x = torch.nn.functional.pad(x, (0, most - x.shape[-1]))
        found = x.new_empty(self.world_size * len(x), *x.shape[1:])
        with _said(self):
            _GATHER(found, x.contiguous())
        parts = zip(found.chunk(self.world_size), sizes, strict=True)
        return torch.cat([part[..., :size] for part, size in parts], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return what rank 0 has of `x`, in its place."""
        with _said(self):
            dist.broadcast(x, 0)
        return x

    def gather_objects(self, mine: object) -> list[Any]:
        """Return what each rank gave, by rank; through the hosts' memory."""
        found: list[Any] = [None] * self.world_size
        with _said(self):
            dist.all_gather_object(found, mine, group=_hosts())
        return found

    def of_leader(self, value: Any = None) -> Any:  # noqa: ANN401
        """Return what rank 0 gives, which others wait for as long as it takes."""
        told = [value]
        with _said(self):
            dist.broadcast_object_list(told, 0, group=_hosts())
        return told[0]


@contextmanager
def join_ranks(
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    init_method: str = "env://",
) -> Iterator[TensorParallel]:
    """Be a rank inside the block; wait at its end until all have got there.

    A rank that ends without that, killed or by an error, ends the others: each says so in one
    sentence on stderr and exits with status 1. What waits in a collective couldn't go on.

    Args:
        rank: Of this process, from 0.
        world_size: How many there are.
        device: Of this process; a card, or the CPU, where ranks talk by gloo.
        init_method: How they meet, as torch.distributed has it.

    Raises:
        BackendError: they didn't meet.
    """
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.set_device(device)
    group = TensorParallel(rank, world_size, device)
    with _said(group):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_card else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if on_card else None,
        )
    watch = RankWatch(rank, group.gather_objects(RankWatch.own_process()))
    try:
        yield group
        with _said(group):
            dist.barrier(group=_hosts())
        watch.stop()
    finally:
        _hosts.cache_clear()
        _leave()


def _leave() -> None:
    """Let go of the group; not for ever, as NCCL waits for what failed and for living graphs."""
    gc.collect()
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)


@contextmanager
def launched() -> Iterator[TensorParallel | None]:
    """Be a rank inside the block if `torchrun` started this process, by its variables.

    Gives None in a process that runs alone.

    Raises:
        BackendError: the ranks are of several hosts, or there are fewer cards than ranks.
    """
    told = settings.launched_rank()
    if told is None or told.world_size == 1:
        yield None
        return
    if told.local_world_size != told.world_size:
        raise BackendError(
            f"{told.world_size} ranks on several hosts can't share a model: here are "
            f"{told.local_world_size}. Start all with torchrun --standalone on one host."
        )
    device = rank_device(told.local_rank, told.world_size)
    with join_ranks(rank=told.rank, world_size=told.world_size, device=device) as group:
        yield group


def rank_device(local_rank: int, world_size: int) -> torch.device:
    """Return where a rank runs: on a card of its own, or on the CPU where there is no card.

    Raises:
        BackendError: there are cards, but not enough.
    """
    cards = torch.cuda.device_count()
    if cards == 0:
        return torch.device("cpu")
    if cards < world_size:
        raise BackendError(
            f"{world_size} ranks want a card each, and torch sees {cards}. Start {cards} or fewer."
        )
    return torch.device("cuda", local_rank)


@cache
def _hosts() -> dist.ProcessGroup:
    """Return the group through which hosts talk, whatever the device: made once, by all ranks."""
    return dist.new_group(backend="gloo", timeout=LEADER_TIMEOUT)


@contextmanager
def _said(group: TensorParallel) -> Iterator[None]:
    """Turn what torch.distributed raises into a sentence."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        time.sleep(NOTICE_SECONDS)  # if one has ended, the watch says so and ends this process
        text = " ".join(str(error).split("\n")[0].split())
        others = ", ".join(str(n) for n in range(group.world_size) if n != group.rank)
        raise BackendError(
            f"Rank {group.rank} of {group.world_size} can't reach the others ({others}): {text} "
            "If one has ended, its own message says why; start all again."
        ) from error


def even_parts(total: int, unit: int, world_size: int) -> tuple[range, ...] | None:
    """Return a part for each rank that begins at a multiple of `unit`, as even as that allows.

    None where there are fewer units than ranks. The last unit may be short.
    """
    units = -(-total // unit)
    if units < world_size:
        return None
    ends = [-(-units * n // world_size) * unit for n in range(world_size + 1)]
    return tuple(range(b, min(e, total)) for b, e in pairwise(ends))
