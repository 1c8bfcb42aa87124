"""A process that forks a child per run, which may die just before its N-th file-system event."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qtool.recipe.load import recipe_from_mapping
from tests.helpers import ROOT

SMALL_SHARD = 30_000
REPORT = "quantization_report.json"
VARYING = ("seconds", "peak_memory_bytes")
QUICK: dict[str, dict[str, int]] = {
    "rtn": {},
    "gptq": {"clip_candidates": 2, "polish_rounds": 0},
    "bcq": {"rounds": 1, "iterations": 1, "polish_rounds": 0},
}
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

Answer = tuple[int, int, str]


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
    wait_ms: int = 0
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
        publish.exchange = lambda first, second: False  # noqa: ARG005
    events.before(os, "fsync")
    events.before(publish, "exchange")
    events.before(stream, "_copy")
    events.before(spool, "save_file", half_a_file)
    sys.addaudithook(events.audit)


def quantize(request: Request) -> None:
    from qtool import pipeline
    from qtool.modeling.locate import locate

    weights: dict[str, Any] = {
        "method": request.method,
        "scheme": {"num_bits": request.num_bits, "group_size": 32},
        "options": QUICK[request.method],
        "overrides": [{"match": "*.mlp.*", "skip": True}],
    }
    sections: dict[str, Any] = {"weights": weights}
    if request.method != "rtn":
        samples = {"num_samples": 4, "sequence_length": 32, "cache": request.cache}
        sections["calibration"] = {"dataset": request.text, **samples}
    pipeline.quantize(
        locate(request.model),
        Path(request.out_dir),
        recipe_from_mapping(sections),
        overwrite=request.overwrite,
        resume=request.resume,
    )


def start(request: Request) -> tuple[int, int]:
    """Fork a child that does one run; return it, and where it will tell how it went."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    events = Events(str(Path(request.out_dir).parent), request.die_at)
    message = ""
    try:
        time.sleep(request.wait_ms / 1000)
        prepare(request, events)
        quantize(request)
    except BaseException as error:  # noqa: BLE001 - it is sent to the parent
        message = f"{type(error).__name__}: {error}"
    os.write(writing, json.dumps([events.count, message]).encode())
    os._exit(1 if message else 0)


def wait(child: int, reading: int) -> Answer:
    """Return the status of a child (negative: a signal), its events, and its error."""
    with os.fdopen(reading) as said:
        answer = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, message = json.loads(answer) if answer else (0, "")
    return status, count, message


def main() -> None:
    """Serve; the first run happens here, so that the children have what it imports."""
    quantize(Request(**json.loads(sys.stdin.readline())))
    for line in sys.stdin:
        children = [start(Request(**values)) for values in json.loads(line)]
        answers = [wait(*child) for child in children]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def server(warm: Request) -> Iterator[Callable[..., list[Answer]]]:
    """Yield a function that does runs at the same time, each in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.robustness.killing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to_it, from_it = process.stdin, process.stdout
        to_it.write(json.dumps(dataclasses.asdict(warm)) + "\n")

        def ask(*requests: Request) -> list[Answer]:
            to_it.write(json.dumps([dataclasses.asdict(request) for request in requests]) + "\n")
            to_it.flush()
            return [(status, count, text) for status, count, text in json.loads(from_it.readline())]

        yield ask
        to_it.close()


def contents(directory: Path) -> dict[str, Any]:
    """Return all files by relative path, without what differs from run to run."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    found: dict[str, Any] = {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}
    if REPORT in found:
        report = json.loads(found[REPORT])
        rows = [report, *report["layers"]]
        found[REPORT] = [
            {key: row[key] for key in row if key not in (*VARYING, "layers")} for row in rows
        ]
    return found


if __name__ == "__main__":
    main()
