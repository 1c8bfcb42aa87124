"""A program of its own: checks and times one peer. What it does or how it ends harms nobody else.

Arguments: the module that has PEERS, and the peer's name. It reads a request as JSON, and writes a
line of JSON for each shape and number of tokens as soon as that is measured (`measured`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qtool.scheme import Shape2D
from qtool.storage.plain_json import json_line
from qtool.timing.kernels import inputs
from qtool.timing.peers._peer import Peer, PeerWeight
from qtool.timing.synthetic import DTYPE, generator_on, random_dense
from qtool.timing.timing import CudaTimer, Timed, Timer, copies_needed, rotation, time_calls

TOLERANCE = 0.01
"""Relative error of a product beside that of its own codes in float64: bfloat16 is off by 0.003."""
ROUNDED = 0.7
"""Relative error of the codes beside the weight: two bits are off by 0.5, other weights by 1.4."""


class WrongProductError(Exception):
    """A peer's product isn't that of its weight: how long it takes says nothing."""


def measured(
    peer: Peer, shape: Shape2D, tokens: Sequence[int], l2_bytes: int, timer: Timer
) -> Iterator[dict[str, Any]]:
    """Check a peer at every number of tokens, then time it.

    Yields:
        For each: `tokens`, `seconds` of a call, `num_bytes` of the weight, relative `error`.

    Raises:
        WrongProductError: it multiplies by something else.
        ValueError: it doesn't take such a shape.
    """
    reason = peer.why_not_shape(*shape)
    if reason is not None:
        raise ValueError(reason)
    device = timer.device if isinstance(timer, CudaTimer) else torch.device("cpu")
    dense = random_dense(shape, DTYPE, generator_on(device))
    first = peer.build(dense)
    xs = {count: inputs(count, shape.in_features, peer.dtype, device) for count in tokens}
    stands_for = _stands_for(first, dense)
    errors = {count: _checked(first, x, stands_for, count) for count, x in xs.items()}
    del stands_for
    copies = copies_needed(first.num_bytes, l2_bytes)
    weights = [first, *(peer.build(dense) for _ in range(copies - 1))]
    for count, x in xs.items():
        calls = [partial(weight.matmul, x) for weight in rotation(weights)]
        seconds = time_calls(calls, timer)
        measures = {"seconds": seconds, "num_bytes": first.num_bytes, "error": errors[count]}
        yield {"tokens": count, **measures}


def _stands_for(weight: PeerWeight, dense: Tensor) -> Tensor:
    """Return what the codes of a peer stand for, in float64; the weight, if it doesn't tell."""
    if weight.dense is None:
        return dense.double()
    found = weight.dense().double().view_as(dense)
    error = _relative(found, dense.double())
    if not error < ROUNDED:
        raise WrongProductError(f"its codes are off by {error:.2g} of the weight")
    return found


def _checked(weight: PeerWeight, x: Tensor, stands_for: Tensor, tokens: int) -> float:
    """Return the relative error of a product."""
    product = weight.matmul(x)
    assert isinstance(product, Tensor)
    exact = x.double() @ stands_for.T
    error = _relative(product.double().view_as(exact), exact)
    allowed = ROUNDED if weight.dense is None else TOLERANCE
    if not error < allowed:
        raise WrongProductError(
            f"its product is off by {error:.2g} at {tokens} tokens, and {allowed:g} is allowed"
        )
    return error


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def on_host(calls: Sequence[Timed]) -> Sequence[float]:
    """Time calls by the clock of a CPU: once."""
    begin = time.perf_counter()
    for call in calls:
        call()
    return [time.perf_counter() - begin]


def in_one_line(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@torch.no_grad()
def tell_all(peer: Peer, request: dict[str, Any], tell: Callable[[dict[str, Any]], object]) -> None:
    """Tell what a peer does on each shape of a request; one that it fails ends no other."""
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timer = CudaTimer(device) if device.type == "cuda" else on_host
    for size in request["shapes"]:
        shape = Shape2D(*size)
        try:
            for measure in measured(peer, shape, request["tokens"], request["l2_bytes"], timer):
                tell({"shape": shape, **measure})
        except Exception as error:  # noqa: BLE001 - other people's code
            tell({"shape": shape, "failed": in_one_line(error)})


def _main(module: str, name: str) -> None:
    output = os.dup(1)
    os.dup2(2, 1)  # what a library prints isn't a result
    peer = next(one for one in import_module(module).PEERS if one.name == name)
    tell_all(peer, json.load(sys.stdin), lambda line: os.write(output, json_line(line) + b"\n"))


if __name__ == "__main__":
    _main(*sys.argv[1:])
