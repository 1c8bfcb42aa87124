"""Peers, each in a process of its own with a time limit: none can end or stall a run of ours."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from qtool.plugins import load, names
from qtool.scheme import Shape2D
from qtool.storage.plain_json import json_line
from qtool.timing import peers
from qtool.timing.peers._peer import Peer

PEER_SECONDS = 240
"""Of a peer, all its shapes together; some compile a kernel for each."""
PROGRAM = (sys.executable, "-m", "qtool.timing.peer_child")


@dataclass(frozen=True, slots=True)
class PeerTime:
    """A peer on one layer at one number of tokens."""

    tokens: int
    microseconds: float
    weight_bytes: int
    error: float
    """Of its product, relative to that of its own codes in float64."""


@dataclass(frozen=True, slots=True)
class PeerRun:
    """What a peer's process told."""

    times: dict[Shape2D, list[PeerTime]] = field(default_factory=dict)
    failed: dict[Shape2D, str] = field(default_factory=dict)
    """Why a shape, or some of its numbers of tokens, wasn't timed."""


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """What peers are timed on: for each the same."""

    shapes: Sequence[Shape2D]
    tokens: Sequence[int]
    l2_bytes: int
    device: torch.device


def every_peer() -> list[tuple[str, Peer]]:
    """Return peers with the module that has each, those inside torch first."""
    found = [
        (f"{peers.__name__}.{name}", peer)
        for name in names(peers)
        for peer in load(peers, name, "PEERS", tuple)
    ]
    return sorted(found, key=lambda one: not one[1].is_in_torch)


def run_peer(
    module: str,
    name: str,
    request: PeerRequest,
    *,
    seconds: float = PEER_SECONDS,
    program: Sequence[str] = PROGRAM,
) -> PeerRun:
    """Check and time a peer.

    Args:
        module: Has PEERS.
        name: Of one of them.
        request: What it is timed on.
        seconds: It is stopped after so many; what it has told by then counts.
        program: Does what `peer_child` does.
    """
    asked = {
        "shapes": request.shapes,
        "tokens": list(request.tokens),
        "l2_bytes": request.l2_bytes,
        "device": str(request.device),
    }
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as errors:
        command = [*program, module, name]
        ended = _ended(command, json_line(asked), seconds, told, errors)
        told.seek(0)
        run = _read(told.read().decode(errors="replace"))
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    for shape in request.shapes:
        done = {time.tokens for time in run.times.get(shape, ())} >= set(request.tokens)
        if not done and shape not in run.failed:
            run.failed[shape] = ": ".join([ended, *last])[:300]
    return run


def _ended(
    command: Sequence[str], asked: bytes, seconds: float, told: BinaryIO, errors: BinaryIO
) -> str:
    """Run a program and all that it starts; return how it ended."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=told, stderr=errors, start_new_session=True
    )
    try:
        process.communicate(asked, seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its compilers are in its session too
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return f"ended by signal {-code}" if code < 0 else f"ended with status {code}"


def _read(text: str) -> PeerRun:
    """Return what complete lines say."""
    run = PeerRun()
    for line in text.splitlines():
        try:
            value: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # it was stopped while it wrote
        shape = Shape2D(*value["shape"])
        if "failed" in value:
            run.failed[shape] = value["failed"]
            continue
        micros, error = 1e6 * value["seconds"], value["error"]
        time = PeerTime(value["tokens"], micros, value["num_bytes"], error)
        run.times.setdefault(shape, []).append(time)
    return run
