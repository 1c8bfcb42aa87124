"""Several processes that train one model: each learns from its samples, gradients are added up.

As `torchrun` starts them. All hold the same model, and take the same steps; the first one writes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from qtool import settings
from qtool.training.schedule import Point

PATIENCE_OF_FELLOWS = timedelta(days=1)
"""While the first one quantizes the others wait."""


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Let the processes that `torchrun` has started meet; nothing where it hasn't.

    With cards each process takes the one of its local rank.
    """
    told = settings.launched_rank()
    if told is None or told.world_size == 1 or distributed.is_initialized():
        yield
        return
    cards = torch.cuda.is_available()
    if cards:
        torch.cuda.set_device(told.local_rank)
    backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE_OF_FELLOWS)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def fellows() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process is the one that says and writes things."""
    told = settings.launched_rank()
    return told is None or told.rank == 0


def own_samples(count: int) -> slice:
    """Return which of so many samples this process learns from."""
    if fellows() == 1:
        return slice(0, count)
    place, total = distributed.get_rank(), fellows()
    return slice(count * place // total, count * (place + 1) // total)


@torch.no_grad()
def add_up(loss: Tensor, values: Sequence[nn.Parameter]) -> Tensor:
    """Make gradients the sum of those of all processes, and return the sum of the losses.

    What has no gradient in any process has none afterwards.
    """
    if fellows() == 1:
        return loss
    loss = loss.clone()
    distributed.all_reduce(loss)
    has = torch.tensor([value.grad is not None for value in values], dtype=torch.int64)
    has = has.to(loss.device)
    distributed.all_reduce(has)
    for value, count in zip(values, has.tolist(), strict=True):
        if count:
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            distributed.all_reduce(value.grad)
    return loss


def agreed(found: float) -> float:
    """Return what the first process has found, so that all decide the same."""
    return float(_of_first(found))


class SharedMemory:
    """A memory that the first process has, and all recall."""

    def __init__(self, own: Any) -> None:  # noqa: ANN401 - a Memory, or None
        self._own = own

    def recall(self) -> tuple[Mapping[str, Tensor], Sequence[Point]] | None:
        """Return what the first process has kept."""
        found = None if self._own is None else self._own.recall()
        result: tuple[Mapping[str, Tensor], Sequence[Point]] | None = _of_first(found)
        return result

    def keep(self, state: Mapping[str, Tensor], points: Sequence[Point]) -> None:
        """Keep it, in the first process."""
        if self._own is not None:
            self._own.keep(state, points)


def _of_first(value: Any) -> Any:  # noqa: ANN401
    if fellows() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
