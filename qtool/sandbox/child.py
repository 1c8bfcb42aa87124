"""The sandbox's child process: what stands between qtool and a program that a model wrote.

Standard library only; `qtool.sandbox.run` starts it in a fresh interpreter.

    keeper      reads the request, enters the namespaces, keeps the time, writes the outcome
    └─ guard    process 1 of the namespace; nothing in it outlives the guard
       └─ the program, without privileges

The program's process writes two lines to the keeper: which protections hold, before it starts,
and at its very end a token that was drawn for this run, or else the exception. A program that
leaves early, with whatever exit code, never gets to the second line.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import time
from pathlib import Path
from typing import Any

from qtool.sandbox import linux, program

NOBODY = 65534
SPARE_UIDS = 0x7000_0000  # far above all users that anybody configures
POLL_SECONDS = 0.05
SIGNALED = 256  # the guard passes on death by signal s as exit code 256 - s


def answer_request() -> None:
    """Run one request from standard input; write its outcome to standard output."""
    try:
        with open(0, "rb", closefd=False) as file:
            answer = keep(json.load(file))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        answer = {"error": f"{type(error).__name__}: {error}"[: program.DETAIL]}
    os.write(1, json.dumps(answer).encode())
    os._exit(0)  # there is nothing to clean up, and the parent waits


def keep(request: dict[str, Any]) -> dict[str, Any]:
    """Be the keeper of one program."""
    uid = _program_uid()
    isolated = bool(request["isolate"])
    os.chown(request["work"], uid, -1)
    with contextlib.suppress(OSError):
        os.nice(10)
        Path("/proc/self/oom_score_adj").write_text("1000")  # first to go when memory is short
    if isolated:
        linux.enter_namespaces(uid)
    elif linux.LINUX:
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    stop, stop_writer = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(stop_writer, b"!"))
    if linux.LINUX:
        linux.die_with_parent(signal.SIGTERM)
    token = secrets.token_hex(16)
    alive, alive_writer = os.pipe()
    message, message_writer = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(alive)
        os.close(message)
        _guard(request, uid, token, message_writer)
    os.close(alive_writer)
    os.close(message_writer)
    stopped = _watch(alive, stop, request)
    code = _end(guard, uid, isolated=isolated)
    os.set_blocking(message, False)
    lines = b""
    with contextlib.suppress(BlockingIOError):
        lines = os.read(message, 1 << 16)
    return _judge(lines.decode(errors="replace"), token, code, stopped)


def _program_uid() -> int:
    """As root a user that nobody else is, so that nothing but the program's own is in its reach."""
    if os.geteuid() != 0:
        return os.geteuid()
    spare = SPARE_UIDS + os.getpid()
    with contextlib.suppress(OSError):  # in a container with few users, nobody has to do
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            first, _, count = map(int, line.split())
            if first <= spare < first + count:
                return spare
    return NOBODY


def _watch(alive: int, stop: int, request: dict[str, Any]) -> tuple[str, str] | None:
    """Wait for the guard's end; None, or the limit that was reached before."""
    deadline = time.monotonic() + request["seconds"]
    poller = select.poll()
    for file in (alive, stop, request["stop"]):
        poller.register(file, select.POLLIN)
    poller.register(1, 0)  # an error once nobody can read the answer
    while (left := deadline - time.monotonic()) > 0:
        # Namespaces come with a bounded file system; elsewhere somebody has to look.
        pause = left if request["isolate"] else min(left, POLL_SECONDS)
        ready = [file for file, _ in poller.poll(1000 * pause)]
        if alive in ready:
            return None
        if ready:
            return "killed", "the caller went away"
        if not request["isolate"] and _disk_use(request["work"]) > request["file_bytes"]:
            return "killed", f"more than {request['file_bytes']} bytes of files"
    return "timeout", f"wall-clock limit of {request['seconds']:g} s"


def _disk_use(work: str) -> float:
    """Bytes in files below a directory; infinite if they can't be counted."""
    total, files, folders = 0, 0, [work]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    files += 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > linux.MAX_FILES:
                        return float("inf")
        except FileNotFoundError:
            continue  # removed in the meantime
        except OSError:
            return float("inf")  # closed, or too deep for a path: a hiding place
    return total


def _end(guard: int, uid: int, *, isolated: bool) -> int:
    """End the guard and all that the program left; return the exit code of the program."""
    os.kill(guard, signal.SIGKILL)  # maybe it has ended, which this doesn't change
    code = os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])
    # The kernel ends a namespace with its process 1, before that is waited for.
    for _ in range(0 if isolated else 1000):
        _kill_all(uid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.002)
    return code - SIGNALED if code > 128 + 64 else code


def _kill_all(uid: int) -> None:
    """Kill all processes of the program's own user, or else the descendants of this one."""
    if uid >= SPARE_UIDS:
        killer = os.fork()
        if killer == 0:
            with contextlib.suppress(OSError):
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)
        return
    for pid in _descendants():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _descendants() -> list[int]:
    """The processes below this one, from /proc; none without it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    found: list[int] = []
    layer = {os.getpid()}
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found += layer
    return found


def _judge(text: str, token: str, code: int, stopped: tuple[str, str] | None) -> dict[str, Any]:
    """The outcome, from the two lines and the exit code."""
    first, _, last = text.partition("\n")
    if stopped and not first:  # a slow machine, and a limit too short to start in
        return {"status": stopped[0], "detail": stopped[1], "protections": []}
    if not first.startswith("["):
        reason = first or f"it ended with {code}"
        return {"error": f"the program couldn't be started: {reason}"}
    status, detail = "failed", f"ended with exit code {code} before its end"
    if stopped:
        status, detail = stopped
    elif code == -signal.SIGXCPU:
        status, detail = "timeout", "limit of processor time"
    elif code < 0:
        status, detail = "killed", f"signal {signal.Signals(-code).name}"
    elif last == token and code == 0:
        status, detail = "passed", ""
    elif last:
        detail = " ".join(last.split())[: 2 * program.DETAIL]
    return {"status": status, "detail": detail, "protections": json.loads(first)}


def _guard(request: dict[str, Any], uid: int, token: str, message: int) -> None:
    """Be the guard: start the program, wait for it, pass on how it ended."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if linux.LINUX:
            linux.die_with_parent()
            poller = select.poll()
            poller.register(message, 0)
            if poller.poll(0):  # the keeper died before the line above
                os._exit(1)
        null = os.open("/dev/null", os.O_RDWR)
        for file in (0, 1, 2):
            os.dup2(null, file)
        if request["isolate"]:
            linux.build_root(Path(request["work"]), request["file_bytes"])
        started = program.start(request, uid, token, message)
        os.close(message)
        while (ended := os.wait())[0] != started:
            pass  # an orphan
        os._exit(os.waitstatus_to_exitcode(ended[1]) % SIGNALED)
    except BaseException as error:  # noqa: BLE001 - nothing may return to the keeper's code
        with contextlib.suppress(OSError):
            os.write(message, f"{type(error).__name__}: {error}"[: program.DETAIL].encode())
    finally:
        os._exit(1)
