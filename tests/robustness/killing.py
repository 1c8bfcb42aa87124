"""A process that forks a child per run, and lets it die just before its N-th file-system event.

Requests and answers are lines of JSON: `Request` in, `{"code": ..., "events": ...}` out.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import recipe

SMALL_SHARD = 30_000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "fcntl.flock",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One run of `quantize`."""

    model: str
    out_dir: str
    text: str
    method: str = "rtn"
    num_bits: int = 4
    overwrite: bool = False
    resume: bool = False
    sharded: bool = False
    mode: str = "beside"
    """`inside`: as if OUT_DIR were a mount point; `renames`: as if names couldn't be exchanged."""
    cache: str = "memory"
    die_at: int = 0
    """Number of the event that doesn't happen any more; 0: none."""


class Events:
    """Counts what changes files below a folder, and kills the process at one of them."""

    def __init__(self, folder: str, die_at: int) -> None:
        self.folder, self.die_at, self.count = folder, die_at, 0

    def happen(self, before: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.die_at:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            counts = isinstance(path, str) and path.startswith(self.folder) and flags & WRITING
        else:
            counts = event in EVENTS
        if counts:
            self.happen()

    def before(self, module: Any, name: str, half: Callable[..., object] | None = None) -> None:
        """Count the calls of a function of which Python tells nothing; `half` does it in part."""
        function = getattr(module, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.happen(lambda: half and half(*arguments))
            return function(*arguments, **keywords)

        setattr(module, name, counted)


def half_a_file(_tensors: object, path: Path, _notes: object) -> None:
    path.write_bytes(b"\x40\x00\x00")


def prepare(request: Request, events: Events) -> None:
    """Change, in this process only, what the request wants to be otherwise."""
    from qtool.checkpoint import place, publish, spool, stream, writer

    if request.sharded:
        writer.MAX_SHARD_BYTES = SMALL_SHARD
    if request.mode == "inside":
        place.is_mount_point = lambda path: str(path) == request.out_dir
    if request.mode == "renames":
        publish.exchange = lambda _first, _second: False
    events.before(os, "fsync")
    events.before(publish, "exchange")
    events.before(stream, "_copy")
    events.before(spool, "save_file", half_a_file)
    sys.addaudithook(events.audit)


def quantize(request: Request) -> None:
    from qtool import pipeline

    sections: dict[str, Any] = {}
    options = {"rounds": 2, "iterations": 1} if request.method == "bcq" else {}
    if request.method != "rtn":
        samples = {"num_samples": 4, "sequence_length": 32, "cache": request.cache}
        sections["calibration"] = {"dataset": request.text, **samples}
    chosen = recipe(request.method, request.num_bits, **sections)
    weights = chosen.weights.model_copy(update={"options": options})
    pipeline.quantize(
        request.model,
        Path(request.out_dir),
        chosen.model_copy(update={"weights": weights}),
        overwrite=request.overwrite,
        resume=request.resume,
    )


def run(request: Request) -> tuple[int, int, str]:
    """Return the status of a child (negative: a signal), its events, and its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        events = Events(str(Path(request.out_dir).parent), request.die_at)
        message = ""
        try:
            prepare(request, events)
            quantize(request)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps([events.count, message]).encode())
        os._exit(1 if message else 0)
    os.close(writing)
    with os.fdopen(reading) as said:
        answer = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, message = json.loads(answer) if answer else (request.die_at, "")
    return status, count, message


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from qtool import pipeline  # noqa: F401 - the children have it then

    for line in sys.stdin:
        print(json.dumps(run(Request(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
