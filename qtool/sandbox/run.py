"""Untrusted programs, run one by one in a sandbox: what a model wrote for HumanEval or MBPP.

Each program gets a fresh interpreter, an empty directory, an empty environment, no input and no
output. Two ways to confine it, of which the machine decides:

- With Linux namespaces the program is alone: it sees no process, file, network or device but its
  own, and everything it started ends with it.
- Without (some containers, macOS) the program runs under a user of its own if qtool is root, and
  under Landlock, a filter of system calls and an audit hook. It can see that others run.

What isn't stopped: a bug of the kernel; up to `processes` times `memory_bytes` of memory and as
many busy cores for the time limit; reading the interpreter's and the system's own files. A program
can't find what proves its end by climbing frames, tracing or asking the garbage collector, but
native code and /proc/self/mem can, and a program can change what its own tests call: this keeps
programs from harm, not every cheater from a benchmark.

Without namespaces the files are counted every 50 ms: more can be written in between, or to an open
file without a name. Process pools don't work there, for want of /dev/shm. Without namespaces,
Landlock and seccomp (macOS, other processors), native code that gets past the audit hook has the
rights of its user, and the network: it can harm files and processes. Use a virtual machine there.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qtool.errors import QtoolError

GRACE_SECONDS = 20.0  # for the keeper to start and to clean up; it keeps the time limit itself
# Stand-ins for the packages: the real `qtool` would be imported with all that it needs.
LAUNCHER = """
import sys, types
for name, folder in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from qtool.sandbox.child import answer_request
answer_request()
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0  # of wall-clock time
    cpu_seconds: int = 10  # of each process
    memory_bytes: int = 1 << 30  # address space of each process
    file_bytes: int = 16 << 20  # of each file, and of all files together
    processes: int = 16  # and threads


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    `passed`: it ran to its last line. `failed`: an exception, or it left before its last line.
    `timeout`: the limit on time. `killed`: a signal, or the limit on files.
    """

    status: Literal["passed", "failed", "timeout", "killed"]
    detail: str  # the exception, the signal or the limit; one short line


_Ended = tuple[Outcome, tuple[str, ...]]
"""How a program ended, and the protections that held."""


def run_programs(
    sources: Sequence[str], limits: Limits = Limits(), *, isolate: bool | None = None
) -> list[Outcome]:
    """Run programs side by side, whatever they do; outcomes in the order of the sources.

    Args:
        sources: Python texts, each run as `__main__`.
        limits: What each may use.
        isolate: With namespaces or without; None: with, where the machine allows it.

    Raises:
        QtoolError: the sandbox can't be set up; never because of what a program does.
    """
    confined = _namespaces_work() if isolate is None else isolate
    return [outcome for outcome, _ in _run_all(sources, limits, isolate=confined)]


def protections(*, isolate: bool | None = None) -> tuple[str, ...]:
    """What holds on this machine, in words, found by running a program.

    Raises:
        QtoolError: the sandbox can't be set up.
    """
    return _probe(isolate=_namespaces_work() if isolate is None else isolate)


@functools.cache
def _namespaces_work() -> bool:
    try:
        return sys.platform == "linux" and bool(_probe(isolate=True))
    except QtoolError:
        return False


@functools.cache
def _probe(*, isolate: bool) -> tuple[str, ...]:
    [(outcome, holds)] = _run_all(["import math, re, random, hashlib"], Limits(), isolate=isolate)
    if outcome.status != "passed":
        raise QtoolError(f"The sandbox can't run a trivial program here: {outcome.detail}.")
    return holds


def _run_all(sources: Sequence[str], limits: Limits, *, isolate: bool) -> list[_Ended]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    stop, stopper = os.pipe()  # all keepers watch it
    with os.fdopen(stop), os.fdopen(stopper, "w"), ThreadPoolExecutor(cores) as pool:
        try:
            futures = [pool.submit(_run, source, limits, isolate, stop) for source in sources]
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C too: nothing may go on behind the caller's back
            os.write(stopper, b"!")
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run(source: str, limits: Limits, isolate: bool, stop: int) -> _Ended:  # noqa: FBT001
    base = Path(tempfile.mkdtemp(prefix="qtool-sandbox-"))
    try:
        base.chmod(0o711)  # the program, maybe another user, has to get to its directory
        work = base / "work"
        work.mkdir(mode=0o700)
        place = {"work": str(work), "isolate": isolate, "stop": stop}
        answer = _ask({**dataclasses.asdict(limits), **place, "source": source})
    finally:
        _remove(base)
    if "error" in answer:
        raise QtoolError(
            f"The sandbox can't be set up: {answer['error']}. This machine may refuse it, or "
            "the limits are too low; `protections()` says what works here."
        )
    return Outcome(answer["status"], answer["detail"]), tuple(answer["protections"])


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Start a keeper, give it the request and wait for its answer."""
    folder = Path(__file__).parent
    packages = [("qtool", str(folder.parent)), ("qtool.sandbox", str(folder))]
    environment = {
        "HOME": request["work"],
        "TMPDIR": request["work"],
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",  # a set of words has the same order in every run
        "PYTHONUTF8": "1",
    }
    with subprocess.Popen(
        # -P, -s, -S: nothing but the standard library; -I would ignore the seed.
        [sys.executable, "-P", "-s", "-S", "-B", "-c", LAUNCHER.format(packages=packages)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=request["work"],
        env=environment,
        start_new_session=True,
        pass_fds=[request["stop"]],
    ) as keeper:
        try:
            text = json.dumps(request).encode()
            answer, _ = keeper.communicate(text, timeout=request["seconds"] + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            answer = b""
            keeper.terminate()  # it ends first all that it guards
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.communicate(timeout=GRACE_SECONDS)
            keeper.kill()
    if answer:
        return dict(json.loads(answer))
    if keeper.returncode >= 0:
        return {"error": f"{sys.executable} ended with exit code {keeper.returncode}"}
    detail = "the sandbox's own process was killed or stopped"
    return {"status": "killed", "detail": detail, "protections": ()}


def _remove(base: Path) -> None:
    """Remove a directory that a hostile program filled: without recursion, whatever the modes."""
    numbers, folders = itertools.count(), [base]
    emptied = []
    while folders:
        folder = folders.pop()
        emptied.append(folder)
        with contextlib.suppress(OSError):
            folder.chmod(0o700)
            for entry in list(os.scandir(folder)):
                if not entry.is_dir(follow_symlinks=False):
                    Path(entry.path).unlink()
                    continue
                Path(entry.path).chmod(0o700)  # a directory without write permission can't move
                moved = base / f"removed-{next(numbers)}"
                folders.append(Path(entry.path).rename(moved))
    for folder in reversed(emptied):
        with contextlib.suppress(OSError):
            folder.rmdir()
