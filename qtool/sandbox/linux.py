"""What the Linux kernel offers to confine a process; for the sandbox's child process.

Standard library only, Python 3.11 (`os.unshare` came with 3.12). A function does its whole job or
raises `OSError`. No function needs root; as root, namespaces map a user of no importance.

The child runs in this order: `enter_namespaces`, a fork (its result is process 1), `build_root`,
a fork (its result becomes the program), `drop_privileges`, `restrict_files`, `filter_calls`.
"""

import contextlib
import ctypes
import errno
import os
import signal
import struct
import sys
from pathlib import Path

LINUX = sys.platform == "linux"
INSIDE_ID = 1000  # the program's user and group, as seen in its namespace

# Numbers of system calls on x86-64 and arm64. Those called here and not refused to a program.
CALLS = {
    "capset": (126, 91),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "seccomp": (317, 277),
    "clone": (56, 220),
    "clone3": (435, 435),
}
# Refused to every program: the ways to other processes, to sockets (a network namespace doesn't
# hold back AF_VSOCK), to mounts and namespaces, to memory outside of RLIMIT_AS, and the parts of
# the kernel that are attacked most.
REFUSED_CALLS = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "setns": (308, 268),
    "shmget": (29, 194),
    "socket": (41, 198),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
# Their first argument is a process: allowed for the program itself only. In a process namespace
# there is nobody else to send a signal to, and a program may end its own children.
SELF_ONLY = {
    "kill": (62, 129),
    "prlimit64": (302, 261),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tgkill": (234, 131),
    "tkill": (200, 130),
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

NEW_USER, NEW_PID, NEW_NET, NEW_MOUNT = 0x10000000, 0x20000000, 0x40000000, 0x00020000
NEW_IPC, NEW_UTS = 0x08000000, 0x04000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
WORKING_FOLDER, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS = 1, 8
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_DAC_READ_SEARCH = 2
MAX_FILES = 10_000


def machine_column() -> int:
    """The column of this machine in the tables of system calls."""
    machine = os.uname().machine
    if machine not in AUDIT_ARCH or struct.calcsize("P") != 8:  # noqa: PLR2004
        raise OSError(errno.ENOSYS, f"No table of system calls for {machine}")
    return list(AUDIT_ARCH).index(machine)


def libc(name: str, *args: object) -> int:
    """Call a C function that returns -1 and sets errno on failure."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*args)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def syscall(name: str, *args: object) -> int:
    """Call the kernel directly; libc has no function for the younger calls."""
    wide = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return libc("syscall", ctypes.c_long({**REFUSED_CALLS, **CALLS}[name][machine_column()]), *wide)


def prctl(option: int, value: int) -> None:
    """Change one attribute of this process."""
    libc("prctl", option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send a signal when the parent ends. A change of user undoes it."""
    prctl(PR_SET_PDEATHSIG, number)


def enter_namespaces(uid: int) -> None:
    """Leave the machine's namespaces; the next fork is process 1 of its own.

    As root `uid` is the user outside of the namespace that the program will be; else only oneself.
    """
    machine_column()
    own_uid, own_gid, own_pid = os.geteuid(), os.getegid(), os.getpid()
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:  # only a process outside can map more than one user
        os.close(writer)
        with contextlib.suppress(OSError):
            _write_maps(own_pid, reader, (own_uid, own_gid), uid)
            os._exit(0)
        os._exit(1)
    os.close(reader)
    try:
        libc("unshare", NEW_USER | NEW_PID | NEW_NET | NEW_MOUNT | NEW_IPC | NEW_UTS)
        os.write(writer, b"!")
    finally:
        os.close(writer)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError(errno.EPERM, "The users of the namespace can't be mapped")


def _write_maps(pid: int, go: int, own: tuple[int, int], uid: int) -> None:
    if not os.read(go, 1):
        raise OSError(errno.EPERM, "No namespace")
    root = own[0] == 0
    if not root:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    for name, outside in (("uid_map", own[0]), ("gid_map", own[1])):
        text = f"0 0 1\n{INSIDE_ID} {uid} 1\n" if root else f"{INSIDE_ID} {outside} 1\n"
        Path(f"/proc/{pid}/{name}").write_text(text)


def readable_paths() -> list[Path]:
    """What a program may read: the interpreter, and the system's libraries."""
    system = ["/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime"]
    devices = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
    paths = [Path(path) for path in (*system, *devices, sys.base_prefix, sys.base_exec_prefix)]
    return [path for path in dict.fromkeys(paths) if path.exists()]


def build_root(root: Path, scratch_bytes: int) -> None:
    """Make `root` the root directory: readable paths, and an empty /tmp of bounded size.

    Everything else of the machine's files is gone for this process and its children.
    """
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    scratch = root / "tmp"
    scratch.mkdir()
    options = f"size={scratch_bytes},nr_inodes={MAX_FILES},mode=1777"
    _mount("tmpfs", scratch, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in readable_paths():
        _show(root, path)
    (root / "dev/shm").symlink_to("/tmp")
    _set_attributes(root, AT_RECURSIVE, add=ATTR_RDONLY | ATTR_NOSUID)
    _set_attributes(scratch, 0, remove=ATTR_RDONLY)
    with contextlib.suppress(OSError):  # the filter of system calls refuses it as well
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    os.chdir(root)
    syscall("pivot_root", b".", b".")
    libc("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def _mount(
    source: str | Path, target: str | Path, kind: str, flags: int, options: str = ""
) -> None:
    names = [os.fsencode(name) for name in (source, target, kind)]
    libc("mount", *names, ctypes.c_ulong(flags), options.encode())


def _show(root: Path, path: Path) -> None:
    """Bind a path at the same place under `root`."""
    target = root / path.relative_to("/")
    if target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir()
    else:
        target.touch()
    _mount(path, target, "", MS_BIND | MS_REC)


def _set_attributes(path: Path, flags: int, add: int = 0, remove: int = 0) -> None:
    attributes = struct.pack("4Q", add, remove, 0, 0)
    size = len(attributes)
    syscall("mount_setattr", WORKING_FOLDER, os.fsencode(path), flags, attributes, size)


def drop_privileges(uid: int, *, read_all: bool = False) -> None:
    """Become a user without capabilities, for good.

    `uid` is user and group, maybe one's own. `read_all` keeps the one capability to read: for an
    interpreter in a directory that is closed to others, as below /root.
    """
    if os.geteuid() == 0:
        prctl(PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        prctl(PR_SET_KEEPCAPS, 0)
    kept = 1 << CAP_DAC_READ_SEARCH if read_all else 0
    header = struct.pack("Ii", 0x20080522, 0)  # version 3: two words for each set
    syscall("capset", header, struct.pack("6I", kept, kept, 0, 0, 0, 0))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def restrict_files(work: Path) -> None:
    """Allow to read `readable_paths` and to write in `work`: Landlock, Linux 5.13."""
    version = syscall("landlock_create_ruleset", None, 0, 1)
    handled = (1 << {1: 13, 2: 14}.get(version, 15)) - 1  # rights known to this version
    handle = struct.pack("Q", handled)
    ruleset = syscall("landlock_create_ruleset", handle, len(handle), 0)
    file_rights = handled & 0b100_0000_0000_0111  # execute, write, read, truncate
    read_file, read_folder = 0b101, 0b1101
    for path in readable_paths():
        rights = read_folder if path.is_dir() else read_file
        if path == Path("/dev/null"):
            rights = file_rights
        _allow(ruleset, path, rights)
    _allow(ruleset, work, handled)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, folder), 0)
    finally:
        os.close(folder)


def filter_calls(*, self_only: bool) -> None:
    """Refuse dangerous system calls from now on: a seccomp filter, inherited by children.

    With `self_only` also signals to any process but the caller.
    """
    column = machine_column()
    load, equal, above, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    missing = 0x00050000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, list(AUDIT_ARCH.values())[column]), (end, 0, 0, refuse)]
    code += [(load, 0, 0, 0)]
    if column == 0:  # the 32-bit ABI of x86-64 has the same calls under other numbers
        code += [(above, 0, 1, 0x40000000), (end, 0, 0, refuse)]
    for numbers in REFUSED_CALLS.values():
        code += [(equal, 0, 1, numbers[column]), (end, 0, 0, refuse)]
    # glibc falls back from clone3, whose flags a filter can't see, to clone.
    code += [(equal, 0, 1, CALLS["clone3"][column]), (end, 0, 0, missing)]
    code += [(equal, 0, 4, CALLS["clone"][column]), (load, 0, 0, 16), (any_bit, 0, 1, NEW_USER)]
    code += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    for name, numbers in SELF_ONLY.items():
        if name != "prlimit64" and not self_only:
            continue
        code += [(equal, 0, 5, numbers[column]), (load, 0, 0, 16), (equal, 2, 0, os.getpid())]
        # prlimit64 takes 0 for oneself; for kill it is the group, which is the program's own.
        code += [(equal, 1, 0, 0) if name in ("prlimit64", "kill") else (equal, 0, 0, 0)]
        code += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    code += [(end, 0, 0, allow)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    syscall("seccomp", 1, 0, struct.pack("HxxxxxxP", len(code), ctypes.addressof(text)))
