"""The last steps before an untrusted program runs, the run, and the proof that it ended well.

Standard library only; it runs in the sandbox's innermost process, which turns into the program.
"""

import _thread
import contextlib
import json
import operator
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qtool.sandbox import hook, linux

DETAIL = 300  # characters
FORK_SECONDS = 5.0


def start(request: dict[str, Any], uid: int, token: str, message: int) -> int:
    """Fork the process that turns into the program; return its number.

    A program can climb up the frames below its own and read what they hold. So there are none but
    that of `_run`, which holds nothing: a thread forks, calls and at last writes the token by
    functions in C, and of the threads of this process only that one is in the new one.
    """
    gate = _thread.allocate_lock()
    gate.acquire()
    os.register_at_fork(after_in_child=gate.release)  # here the thread waits for ever
    steps: list[Callable[[], Any]] = [
        os.fork,
        gate.acquire,
        partial(_prepare, request, uid, message),
        partial(_run, request["source"]),
        partial(os.write, 3, token.encode()),
        partial(os._exit, 0),
    ]
    results: list[Any] = []
    _thread.start_new_thread(results.extend, (map(operator.call, steps),))
    deadline = time.monotonic() + FORK_SECONDS
    while not results:
        time.sleep(0.0005)
        if time.monotonic() > deadline:
            raise OSError("no process can be forked")
    return int(results[0])


def _prepare(request: dict[str, Any], uid: int, message: int) -> None:
    """Give up all powers, and say which protections hold, or why they don't."""
    try:
        os.setsid()
        os.dup2(message, 3)
        os.closerange(4, 1 << 16)
        protections = _confine(request, uid)
        hook.hide_interpreter()
        os.write(3, json.dumps(protections).encode() + b"\n")
    except BaseException as error:  # noqa: BLE001 - nobody else is there to say it
        os.write(3, f"{type(error).__name__}: {error}"[:DETAIL].encode())
        os._exit(1)


def _confine(request: dict[str, Any], uid: int) -> list[str]:
    """Give up every power that the program doesn't need; return what holds, in words."""
    isolated = bool(request["isolate"])
    work = Path("/tmp" if isolated else request["work"])
    os.chdir(work)
    os.environ.update(HOME=str(work), TMPDIR=str(work))
    holds = [_limit(request, isolated=isolated)]
    if isolated:
        holds += ["no network (own network namespace)", "own process and IPC namespaces"]
        holds += ["own file system: nothing to write but a small, volatile /tmp"]
    if linux.LINUX:
        root = os.geteuid() == 0
        # In a namespace the interpreter was bound to where everybody can read it.
        read_all = root and not isolated and not _open_to_all(Path(os.__file__))
        linux.drop_privileges(linux.INSIDE_ID if isolated else uid, read_all=read_all)
        linux.die_with_parent()
        own = "a user of its own" if root else "the same user"
        holds += [f"{own}, without privileges" + (" but to read" if read_all else "")]
        holds += _kernel_filters(work, isolated=isolated)
    if not isolated:
        hook.watch(str(work))
        holds += ["audit hook: no sockets, foreign files and processes from Python code"]
    return holds


def _kernel_filters(work: Path, *, isolated: bool) -> list[str]:
    holds = []
    if not isolated:
        with contextlib.suppress(OSError):
            linux.restrict_files(work)
            holds += ["files by Landlock: reads the interpreter, writes its directory"]
    with contextlib.suppress(OSError):
        linux.filter_calls(self_only=not isolated)
        holds += ["system calls by seccomp: no sockets, mounts and other processes"]
    return holds


def _open_to_all(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


def _limit(request: dict[str, Any], *, isolated: bool) -> str:
    """Set the resource limits."""
    processes = request["processes"]
    if not isolated and os.geteuid() != 0:
        processes += _tasks_of_user()  # the kernel counts all that this user runs
    cpu = request["cpu_seconds"]
    limits = {
        "RLIMIT_CPU": (cpu, cpu + 1),  # first SIGXCPU, which tells the reason
        "RLIMIT_AS": (request["memory_bytes"],) * 2,
        "RLIMIT_FSIZE": (request["file_bytes"],) * 2,
        "RLIMIT_NPROC": (processes,) * 2,
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_CORE": (0, 0),
    }
    done = []
    for name, (soft, hard) in limits.items():
        number = getattr(resource, name)
        most = resource.getrlimit(number)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(number, (soft, hard))
            done.append(name.removeprefix("RLIMIT_"))
    return f"resource limits ({', '.join(done)})"


def _tasks_of_user() -> int:
    tasks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                tasks += len(list((folder / "task").iterdir()))
    return tasks


def _run(source: str) -> None:
    """Run a program's text as `exec(text, {})` does; leave if it fails, saying how.

    What is needed after the program is bound to local names before it: it may change any module.
    """
    describe, failures, execute, write, leave = _describe, BaseException, exec, os.write, os._exit
    own_pid, this_pid = os.getpid(), os.getpid
    for name in [name for name in sys.modules if name.startswith(("qtool", "ctypes"))]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["program.py"]
    try:
        execute(compile(source, "<program>", "exec"), {})
    except failures as error:  # SystemExit too: a program that leaves hasn't reached its asserts
        if this_pid() == own_pid:
            write(3, (describe(error) or "failed").encode("ascii", "backslashreplace"))
        leave(1)
    if this_pid() != own_pid:  # a fork of the program
        leave(0)


def _describe(error: BaseException) -> str:
    """One line on an exception, even if its class is hostile."""
    name, where, trace = type(error).__name__, "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            where = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    try:
        text = " ".join(str(error)[:DETAIL].split())
    except BaseException:  # noqa: BLE001
        text = "(its text can't be read)"
    return f"{name[:80]}: {text}{where}" if text else f"{name[:80]}{where}"
