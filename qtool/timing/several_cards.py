"""Whole models on several cards of one host, and what their sums over ranks take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qtool.errors import QtoolError
from qtool.modeling.device import free_memory
from qtool.runtime.backends.cuda import driver
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.peer_products import peers_of
from qtool.runtime.backends.cuda.peer_sum import PeerSum, sum_over_peers
from qtool.runtime.decode.cache import use_kv_cache
from qtool.runtime.decode.parallel import ParallelOps, Sum
from qtool.runtime.spawned_ranks import on_ranks
from qtool.runtime.tensor_parallel import TensorParallel
from qtool.settings import KvCache
from qtool.timing.decode import EndToEnd, EndToEndResult, time_decoder
from qtool.timing.machine import Clock
from qtool.timing.synthetic import DTYPE
from qtool.timing.timing import CudaTimer, time_calls

SUM_WIDTHS = (4096, 8192, 65536, 4194304)
"""Numbers in float16: a token of an 8B and of a 70B model, eight tokens, a prompt of 512."""
SUMS_PER_REPLAY = 50


@dataclass(frozen=True, slots=True)
class SumTime:
    """A sum over ranks, after another one as in a graph."""

    num_bytes: int
    """That each rank gives."""
    microseconds: float
    """As the decode runner does it."""
    nccl_microseconds: float


@dataclass(frozen=True, slots=True)
class SeveralCards:
    """What one run measured."""

    cards: int
    sums_by: str
    """`peer_sum`, our kernel; or `nccl`, where cards don't see each other's memory."""
    sums: tuple[SumTime, ...]
    models: tuple[EndToEndResult, ...]
    not_run: dict[str, str]


def time_on_cards(
    models: Sequence[EndToEnd], cards: int, kv_cache: KvCache | None = None
) -> SeveralCards:
    """Time models that so many cards share, by a process on each.

    Raises:
        BackendError: there are fewer cards, or a process failed.
    """
    found: SeveralCards = on_ranks(cards, time_on_rank, tuple(models), kv_cache)
    return found


@torch.no_grad()
def time_on_rank(
    group: TensorParallel, models: Sequence[EndToEnd], kv_cache: KvCache | None = None
) -> SeveralCards:
    """Be one rank of `time_on_cards`."""
    add = sum_over_peers(group, driver.launch)
    card = driver.card_of(group.device.index)
    ops = ParallelOps(KernelOps(driver.launch, card, peers=peers_of(group, card)), add)
    results, not_run = [], {}
    for model in models:
        name = f"{model.name}, {group.world_size} cards"
        try:
            with use_kv_cache(kv_cache):
                found = time_decoder(model, ops, Clock(group.device), group)
            results.append(replace(found, name=name))
        except (QtoolError, torch.OutOfMemoryError) as error:
            not_run[name] = " ".join(str(error).split())
        free_memory()
        if len(set(group.gather_objects(name in not_run))) > 1:
            raise RuntimeError(f"{name}: it runs on some cards only.")
    by = "peer_sum" if isinstance(add, PeerSum) else "nccl"
    sums = tuple(_time_sum(group, add, width) for width in SUM_WIDTHS)
    return SeveralCards(group.world_size, by, sums, tuple(results), not_run)


def _time_sum(group: TensorParallel, add: Sum, width: int) -> SumTime:
    x = torch.zeros(1, width, dtype=DTYPE, device=group.device)
    timer = CudaTimer(group.device)
    ours, theirs = (
        time_calls([lambda run=run: run(x)] * SUMS_PER_REPLAY, timer)  # type: ignore[misc]
        for run in (add, group.all_reduce)
    )
    return SumTime(x.numel() * x.element_size(), ours * 1e6, theirs * 1e6)
