"""Start the ranks of a tensor-parallel group from one process, and take what rank 0 returns."""

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from qtool.errors import BackendError, QtoolError
from qtool.runtime.tensor_parallel import join_ranks, rank_device

START_METHOD = "spawn"
"""A forked process couldn't use a card that this one has used."""
END_SECONDS = 30
"""For ranks to end after one of them has failed, before they are killed."""


def on_ranks(count: int, run: Callable[..., Any], *given: Any) -> Any:  # noqa: ANN401
    """Return what `run(group, *given)` returns on rank 0, run by `count` new processes.

    Args:
        count: Of ranks; each has a card of its own, or all the CPU where there is no card.
        run: Of a module, so that new processes find it; like its arguments and result picklable.
        given: Its other arguments.

    Raises:
        BackendError: a rank failed, with what it said, or ended without a word.
    """
    rank_device(0, count)
    context: Any = multiprocessing.get_context(START_METHOD)
    with tempfile.TemporaryDirectory(prefix="qtool-ranks-") as folder:
        store = (Path(folder) / "store").as_uri()
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        ranks = [
            context.Process(target=_rank, args=(n, count, store, pipes[n][1], run, given))
            for n in range(count)
        ]
        try:
            for rank, (_, theirs) in zip(ranks, pipes, strict=True):
                rank.start()
                theirs.close()
            return _result([ours for ours, _ in pipes], ranks)
        finally:
            for rank in ranks:
                rank.join(END_SECONDS)
                if rank.is_alive():
                    rank.kill()


def _result(pipes: list[Connection], ranks: list[Any]) -> Any:  # noqa: ANN401
    """Wait for all; the first word of a failure is the cause of the others."""
    said: dict[int, Any] = {}
    while len(said) < len(pipes):
        for ready in wait([pipe for n, pipe in enumerate(pipes) if n not in said]):
            number = pipes.index(ready)  # type: ignore[arg-type]
            try:
                error, said[number] = pickle.loads(pipes[number].recv_bytes())
            except EOFError:
                ranks[number].join()
                error = f"its exit status is {ranks[number].exitcode}."
            if error is not None:
                raise BackendError(f"Rank {number} of {len(pipes)} failed: {error}")
    return said[0]


def _rank(
    number: int,
    count: int,
    store: str,
    pipe: Connection,
    run: Callable[..., Any],
    given: tuple[Any, ...],
) -> None:
    """Be one rank."""
    answer: tuple[str | None, Any]
    try:
        device = rank_device(number, count)
        with join_ranks(rank=number, world_size=count, device=device, init_method=store) as group:
            result = run(group, *given)
        answer = (None, result if group.leads else None)
    except QtoolError as error:
        answer = (str(error), None)
    pipe.send_bytes(pickle.dumps(answer))  # by value: this process may end before it is read
    if answer[0] is not None:
        raise SystemExit(1)
