"""Run functions on two processes that share a model, by gloo on the CPU."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qtool.runtime.tensor_parallel import TensorParallel, join_ranks

CPU = torch.device("cpu")


def _rank(number: int, count: int, store: str, run: Callable[..., Any], given: Any) -> Any:
    torch.set_num_threads(1)
    try:
        with join_ranks(rank=number, world_size=count, device=CPU, init_method=store) as group:
            return run(group, *given)
    except BaseException:
        traceback.print_exc()
        raise


def on_ranks(run: Callable[..., Any], *given: Any, count: int = 2) -> list[Any]:
    """Return what `run(group, *given)` returns on each rank, by rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            asked = [pool.submit(_rank, n, count, store, run, given) for n in range(count)]
            return [one.result(180) for one in asked]


__all__ = ["TensorParallel", "on_ranks"]
