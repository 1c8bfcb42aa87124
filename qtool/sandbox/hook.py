"""The audit hook of a sandboxed program: the layer for machines without namespaces.

Standard library only; it runs in the sandbox's child process. CPython reports what a program is
about to do, and the hook refuses with a `PermissionError`. It stops the accidents and the naive
attacks of Python code: native code, a hostile use of `dir_fd` and changed functions of `os.path`
get past it. The kernel's layers (user, Landlock, seccomp) don't depend on it.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

# Which arguments of an event are paths that the program changes, and where the descriptor of the
# folder that they are relative to stands.
CHANGES: dict[str, list[tuple[int, int | None]]] = {
    "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)],
    "os.link": [(0, 2), (1, 3)],
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.removexattr": [(0, None)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.setxattr": [(0, None)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)],
    "os.utime": [(0, 3)],
}
REFUSED_EVENTS = (
    "ctypes.",
    "ftplib.",
    "http.client.",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "resource.prlimit",
    "smtplib.",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendmsg",
    "socket.sendto",
    "subprocess.Popen",
    "urllib.Request",
)
INSPECTION = {
    "gc.get_objects",
    "gc.get_referents",
    "gc.get_referrers",
    "sys._current_exceptions",
    "sys._current_frames",
    "sys.setprofile",
    "sys.settrace",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(work: str) -> None:
    """Refuse writing outside of the directory `work`, other processes and the network."""
    sys.addaudithook(partial(_check, os.path.realpath(work) + os.sep, os.path.realpath))


def hide_interpreter() -> None:
    """Refuse what shows a program more of its interpreter than its own frames.

    It could find what proves that it ended, or jump over its assertions.
    """
    sys.addaudithook(_refuse_inspection)


def _refuse_inspection(event: str, _args: tuple[Any, ...]) -> None:
    if event in INSPECTION:
        raise PermissionError(f"the sandbox refuses {event}")


def _check(work: str, real: Callable[[str], str], event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED_EVENTS) or (event == "import" and args[0] in ("ctypes", "_ctypes")):
        raise PermissionError(f"the sandbox refuses {event}")
    if event == "os.kill" and args[0] != os.getpid():
        raise PermissionError("the sandbox refuses os.kill of another process")
    if event == "os.killpg" and args[0] not in (0, os.getpgrp()):
        raise PermissionError("the sandbox refuses os.killpg of another group")
    if event == "open":
        if isinstance(args[2], int) and args[2] & WRITING:
            _check_path(work, real, args[0], None)
    elif event in CHANGES:
        for path, folder in CHANGES[event]:
            _check_path(work, real, args[path], None if folder is None else args[folder])


def _check_path(work: str, real: Callable[[str], str], path: object, folder: int | None) -> None:
    if isinstance(path, int) or path is None:
        return  # an open file was checked when it was opened
    name = os.fsdecode(path)  # type: ignore[arg-type]
    if folder is not None and folder >= 0:
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)  # noqa: PTH115, PTH118
    # The last part of the name may be a link that is itself removed or replaced.
    target, parent = real(name), real(os.path.dirname(os.path.abspath(name)))  # noqa: PTH100, PTH120
    if target != "/dev/null" and not (target.startswith(work) and (parent + "/").startswith(work)):
        raise PermissionError(f"the sandbox refuses to change {name}")
