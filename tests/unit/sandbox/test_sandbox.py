"""Hostile programs, with namespaces and without; every test also looks for what was left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qtool.errors import QtoolError
from qtool.sandbox import linux
from qtool.sandbox import run as sandbox
from qtool.sandbox.run import Limits, Outcome, protections, run_programs

ENOUGH = Limits(seconds=8)
BRIEF = Limits(seconds=0.6)  # for what never ends by itself
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def processes_of(place: Path) -> list[str]:
    """The processes whose first environment names a directory, with their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(place) in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """Where sandboxes make their directories; nothing may be left in it, nor any process of it."""
    folder = Path(tempfile.mkdtemp(prefix="qtool-place-", dir="/tmp"))
    folder.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    left, running = list(folder.iterdir()), processes_of(folder)
    shutil.rmtree(folder)
    assert left == []
    assert running == []


@pytest.fixture
def canary():
    """A file that everybody may change, in a directory that everybody may change."""
    folder = Path(tempfile.mkdtemp(prefix="qtool-canary-", dir="/tmp"))
    folder.chmod(0o777)
    file = folder / "canary.txt"
    file.write_text("alive")
    file.chmod(0o666)
    yield file
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=[True, False], ids=["namespaces", "fallback"])
def isolate(request):
    if request.param and not sandbox._namespaces_work():
        pytest.skip("this machine allows no namespaces")
    return request.param


@pytest.fixture
def run(isolate):
    def run(source: str, limits: Limits = ENOUGH) -> Outcome:
        return run_programs([source], limits, isolate=isolate)[0]

    return run


def unconfined(source: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program without a sandbox: it shows that the attack works."""
    return subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=20)


# What a program may do.


@pytest.mark.parametrize(
    "source",
    [
        "",
        "import sys; assert sys.stdin.read() == ''",
        "x = 'é漢字🙂'; assert len(x) == 4; print(x)",
        "x = 0\n" + "x += 1\n" * 150_000 + "assert x == 150_000",
        "import math, typing, re, collections, itertools, heapq, hashlib, random, functools\n"
        "assert hashlib.md5(b'a').hexdigest()[:4] == '0cc1' and random.Random(1).random() < 1",
        "import asyncio, uuid, subprocess, decimal; asyncio.run(asyncio.sleep(0)); uuid.uuid4()",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('x')",
        "import os\nopen('a', 'w').write('x'); os.rename('a', 'b'); os.remove('b')",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "if __name__ == '__main__':\n    raise SystemExit(int(input()))",  # as exec(text, {})
        "import sys, traceback\ntry: 1 / 0\nexcept ArithmeticError: traceback.print_exc()",
        "import collections; assert collections.namedtuple('A', 'x')(1).x == 1",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import signal; signal.signal(14, lambda *a: 0); signal.setitimer(0, .01); signal.pause()",
        "import os\nassert '__file__' not in globals() and __name__ == 'builtins'\n"
        "assert os.listdir() == [] and os.environ['HOME'] == os.getcwd()",
    ],
)
def test_passes(run, source):
    assert run(source) == Outcome("passed", "")


def test_hashes_are_the_same_in_every_run(run):
    answers = {run("raise SystemExit(hash('a word'))").detail for _ in range(2)}
    assert len(answers) == 1


# What isn't a pass.


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("x = 1\nassert x == 2, 'wrong'", "AssertionError: wrong (line 2)"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0 (line 2)"),
        ("import os\nos._exit(0)\nassert False", "ended with exit code 0 before its end"),
        ("import os\nos._exit(3)", "ended with exit code 3 before its end"),
        ("exit()", "NameError: name 'exit' is not defined (line 1)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1)"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded (line 1)"),
        ("input()", "EOFError: EOF when reading a line (line 1)"),
        ("x = '\udce4'", "UnicodeEncodeError: "),
        ("x = 1\0", ""),
        ("import os\nos.closerange(0, 256)", "ended with exit code 0 before its end"),
        ("import os\nos.write(3, b'x\\n' * 3)\nassert 0", "x x x AssertionError (line 3)"),
        ("import os\nif os.fork(): os.wait(); os._exit(0)", "ended with exit code 0 before"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E: (its text can't"),
        ("raise ValueError('y' * 10_000)", "ValueError: yyy"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy' (line 1)"),
        ("import qtool.pipeline", "ModuleNotFoundError: No module named 'qtool' (line 1)"),
    ],
)
def test_fails(run, source, detail):
    outcome = run(source)
    assert outcome.status == "failed"
    assert outcome.detail.startswith(detail) or detail == outcome.detail[: len(detail)] == ""
    assert len(outcome.detail) < 400


TAMPERING = [
    "import builtins; builtins.exec = builtins.str = builtins.type = builtins.len = None",
    "import builtins; builtins.BaseException = builtins.Exception = KeyError",
    "import sys; sys.stdout = sys.stderr = None; sys.excepthook = lambda *a: None",
    "import os; os._exit = lambda code: None; os.write = os.getpid = None",
    "import sys; sys.modules.clear()",
    "import atexit; atexit.register(lambda: 1 / 0)",
    "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
]


@pytest.mark.parametrize("tampering", TAMPERING)
def test_tampering_changes_no_verdict(run, tampering):
    assert run(f"{tampering}\nassert 1 == 1").status == "passed"
    assert run(f"{tampering}\nassert 1 == 2").status == "failed"


CLIMB = """
import sys
frame, found = sys._getframe(), []
while frame is not None:
    found += [frame.f_locals, frame.f_globals]
    frame = frame.f_back
seen = set()
while found:
    one = found.pop()
    if id(one) in seen or len(seen) > 20_000:
        continue
    seen.add(id(one))
    if isinstance(one, (str, bytes)):
        assert len(one) != 32 or not all(c in "0123456789abcdef" for c in str(one).strip("b'"))
    elif isinstance(one, dict):
        found += [*one, *one.values()]
    elif isinstance(one, (list, tuple, set)):
        found += one
    else:
        for name in ("__dict__", "__closure__", "__defaults__", "args", "cell_contents"):
            try:
                found.append(getattr(one, name, None))
            except Exception:
                pass
"""
"""Passes if nothing that the frames lead to looks like the token."""


def test_frames_lead_to_no_proof_of_the_end(run):
    assert run(CLIMB) == Outcome("passed", "")


@pytest.mark.parametrize(
    "looking",
    [
        "sys._current_frames()",
        "gc.get_objects()",
        "gc.get_referrers(sys)",
        "gc.get_referents(sys)",
        "sys.settrace(lambda *_: None)",
        "sys.setprofile(lambda *_: None)",
        "threading.settrace(lambda *_: None); threading.Thread(target=print).start()\n"
        "def f():\n    sys._getframe(1).f_lineno = 9\nf()",
    ],
)
def test_looking_into_the_interpreter_is_refused(run, looking):
    outcome = run(f"import gc, sys, threading\n{looking}\n")
    assert outcome.status == "failed"
    assert "the sandbox refuses" in outcome.detail or "can't jump" in outcome.detail


def test_main_thread_is_the_programs_own(run):
    source = "import threading\nassert threading.current_thread() is threading.main_thread()"
    assert run(source) == Outcome("passed", "")


# Time, memory, processes, output and files.


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"],
)
def test_endless_program(run, source):
    started = time.monotonic()
    assert run(source, BRIEF) == Outcome("timeout", "wall-clock limit of 0.6 s")
    assert time.monotonic() - started < 5


def test_a_limit_too_short_to_start_in_is_a_timeout(run):
    assert run("pass", Limits(seconds=0)).status == "timeout"


def test_processor_time(run):
    outcome = run("while True: pass", Limits(seconds=20, cpu_seconds=1))
    assert outcome == Outcome("timeout", "limit of processor time")


def test_stopped_processes_are_ended(run):
    assert run("import os; os.kill(os.getpid(), 19)", BRIEF).status == "timeout"


def test_fork_bomb(run):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, BRIEF).status == "timeout"


def test_processes_are_counted(run):
    source = """
import os, time
for count in range(200):
    try:
        if not os.fork(): time.sleep(60)
    except OSError:
        raise SystemExit(count)
"""
    outcome = run(source, Limits(seconds=5))
    assert outcome.detail.startswith("SystemExit: ")
    assert int(outcome.detail.split()[1]) < 48


@pytest.mark.parametrize(
    "source", ["x = bytearray(1 << 33)", "x = []\nwhile 1: x.append(' ' * 9999)"]
)
def test_memory_bomb(run, source):
    outcome = run(source, Limits(seconds=10, memory_bytes=256 << 20))
    assert outcome.status == "failed"
    assert outcome.detail.startswith("MemoryError")


@pytest.mark.parametrize("stream", [1, 2])
def test_output_flood_is_dropped(run, stream):
    source = f"import os\nwhile True: os.write({stream}, b'x' * 1_000_000)"
    assert run(source, BRIEF).status == "timeout"


def test_limits_cannot_be_raised(run):
    source = """
import resource
for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CPU"):
    soft, hard = resource.getrlimit(getattr(resource, name))
    assert 0 < hard < 1 << 40, name
    try: resource.setrlimit(getattr(resource, name), (hard + 1, hard + 1))
    except (OSError, ValueError): continue
    raise SystemExit(name)
"""
    assert run(source).status == "passed"


@LINUX
def test_limits_of_the_parent_are_out_of_reach(run):
    before = resource_limits(os.getpid())
    source = f"""
import os, resource
for pid in ({os.getpid()}, os.getppid()):
    try: resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, 8))
    except OSError: continue
    raise SystemExit("changed")
"""
    assert run(source).status == "passed"
    assert resource_limits(os.getpid()) == before


def resource_limits(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def test_giant_file(run):
    source = "file = open('giant', 'wb')\nwhile True: file.write(b'x' * (1 << 20))"
    outcome = run(source, Limits(seconds=5, file_bytes=4 << 20))
    assert outcome.status in ("failed", "killed")
    assert "File too large" in outcome.detail or "No space" in outcome.detail


def test_many_files(run, isolate):
    source = """
import time
for number in range(2000):
    with open(f"{number}", "wb") as file: file.write(b"x" * (1 << 20))
    time.sleep(0.002)
"""
    outcome = run(source, Limits(seconds=10, file_bytes=4 << 20))
    if isolate:
        assert outcome.detail.startswith("OSError: [Errno 28] No space left on device")
    else:
        assert outcome == Outcome("killed", f"more than {4 << 20} bytes of files")


def test_a_closed_directory_is_removed(run):
    """`place` looks afterwards."""
    source = """
import os
for depth in range(20):
    os.mkdir("d"); os.chdir("d")
    open("file", "w").close(); os.chmod("file", 0)
for depth in range(20):
    os.chdir(".."); os.chmod("d", 0)
"""
    assert run(source).status in ("passed", "killed")  # killed as a hiding place of files


def test_a_directory_deeper_than_a_path_is_removed(place, monkeypatch):
    base = place / "base"
    base.mkdir()
    monkeypatch.chdir(base)
    for _ in range(3000):
        Path("d").mkdir()
        os.chdir("d")
    os.chdir(place)
    sandbox._remove(base)
    assert not base.exists()


def test_files_are_counted_in_closed_directories_too(run):
    source = """
import os, time
os.mkdir("d"); os.chdir("d"); os.chmod(".", 0o300)
for number in range(2000):
    with open(f"{number}", "wb") as file: file.write(b"x" * (1 << 20))
    time.sleep(0.002)
"""
    assert run(source, Limits(seconds=8, file_bytes=4 << 20)).status in ("killed", "failed")


# Files, processes and secrets of others.

DELETE = """
import os, shutil
for attack in (
    lambda: os.remove({path!r}),
    lambda: open({path!r}, "w"),
    lambda: open({path!r}, "r+").write("dead"),
    lambda: os.truncate({path!r}, 0),
    lambda: os.chmod({path!r}, 0),
    lambda: os.rename({path!r}, {path!r} + ".moved"),
    lambda: os.symlink("/", {path!r} + ".link"),
    lambda: os.remove(os.path.join(*{path!r}.rsplit("/", 1)), dir_fd=os.open("/tmp", 0)),
    lambda: os.mkdir(os.path.dirname({path!r}) + "/new"),
    lambda: shutil.rmtree(os.path.dirname({path!r})),
):
    try: attack()
    except OSError: pass
"""


def test_deletes_nothing(run, canary):
    source = DELETE.format(path=str(canary))
    assert run(source).status == "passed"  # every single attack was refused
    assert canary.read_text() == "alive"
    assert canary.stat().st_mode & 0o777 == 0o666
    assert list(canary.parent.iterdir()) == [canary]
    unconfined(source)
    assert not canary.exists()


def test_reads_no_foreign_file(run, isolate, canary):
    if not isolate and "Landlock" not in " ".join(protections(isolate=False)):
        pytest.skip("without namespaces only Landlock hides files")
    source = f"print(open({str(canary)!r}).read())"
    assert run(source).status == "failed"
    assert b"alive" in unconfined(source).stdout


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(TESTS, 9)",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "os.killpg(GROUP, 9)",
        "os.killpg(0, 9)",
        "signal.pthread_kill(threading.get_ident(), 9)",
    ],
)
def test_kills_nobody_else(run, attack):
    ours = f"TESTS, GROUP = {os.getpid()}, {os.getpgid(0)}"
    outcome = run(f"import os, signal, threading\n{ours}\n{attack}\nraise SystemExit('survived')")
    assert outcome.status in ("failed", "killed")
    assert run("assert True").status == "passed"


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep({delay})
        open({path!r}, "w").write("dead")
        os._exit(0)
    os._exit(0)
time.sleep(0.2)
"""


def test_a_daemon_does_not_outlive_the_program(run, canary, place):
    own = run(DAEMON.format(path="here", delay=60))
    assert own.status == "passed"
    assert processes_of(place) == []  # at once, not only when the daemon is done
    run(DAEMON.format(path=str(canary), delay=0.5))
    time.sleep(0.7)
    assert canary.read_text() == "alive"
    unconfined(DAEMON.format(path=str(canary), delay=0))
    assert canary.read_text() == "dead"


CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"


def test_no_network(run, isolate):
    holds = " ".join(protections(isolate=isolate))
    if "network" not in holds and "sockets" not in holds:
        pytest.skip("nothing holds back the network here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = CONNECT.format(port=server.getsockname()[1])
        server.settimeout(0.2)
        assert run(source).status == "failed"
        with pytest.raises(TimeoutError):
            server.accept()
        assert unconfined(source).returncode == 0
        server.accept()[0].close()


def test_the_environment_is_hidden(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    source = """
import glob, os
found = [repr(os.environ)]
for path in glob.glob("/proc/*/environ"):
    try: found.append(open(path).read())
    except OSError: pass
assert "hunter2" not in "".join(found)
"""
    assert run(source) == Outcome("passed", "")
    assert b"AssertionError" in unconfined(source).stderr


MOUNTS = """
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.umount2(b"/usr", 2) == -1
assert libc.umount2(b"/tmp", 2) == -1
assert libc.mount(None, b"/", None, 32, None) == -1  # MS_REMOUNT, writable
assert libc.mount(b"none", b"/usr", None, 4096 | 32, None) == -1
assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1
assert libc.unshare(0x10000000) == -1 and libc.unshare(0x00020000) == -1
assert libc.chroot(b"/tmp") == -1 and libc.setuid(0) == -1
assert libc.ptrace(16, os.getppid(), 0, 0) == -1
for path in ("/x", "/usr/x", "/dev/x", "/etc/passwd", os.__file__):
    try: open(path, "a")
    except OSError: continue
    raise SystemExit(path)
"""


def test_no_way_out_by_mounts(run, isolate):
    outcome = run(MOUNTS)
    if isolate:
        assert outcome == Outcome("passed", "")
    else:
        assert outcome.detail.startswith("PermissionError: the sandbox refuses import")


# The layers of the fallback below the audit hook, which native code gets past.

NATIVE = """
import ctypes, importlib.util, json, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("layers", {module!r})
layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layers)
os.chdir({work!r})
libc = ctypes.CDLL(None)
root = os.geteuid() == 0
layers.drop_privileges(layers.INSIDE_ID if root else os.geteuid(), read_all=root)
layers.restrict_files(Path({work!r}))
layers.filter_calls(self_only=True)
print(json.dumps(dict(
    remove=libc.unlink({path!r}.encode()),
    write=libc.open({path!r}.encode(), os.O_WRONLY),
    read=libc.open({path!r}.encode(), os.O_RDONLY),
    signal=libc.kill(os.getppid(), 0),
    everybody=libc.kill(-1, 0),
    socket=libc.socket(2, 1, 0),
    limits=libc.prlimit(os.getppid(), 7, None, None),
    namespace=libc.unshare(0x10000000),
    clone=libc.syscall({clone}, 0x10000011, 0, 0, 0, 0),
    own_signal=libc.kill(os.getpid(), 0),
    own_file=min(0, libc.open(b"new", os.O_WRONLY | os.O_CREAT, 0o600)),
    own_fork=os.waitpid(os.fork() or os._exit(0), 0)[1],
)))
"""


@LINUX
def test_kernel_layers_hold_without_the_hook(canary):
    holds = " ".join(protections(isolate=False))
    if "Landlock" not in holds or "seccomp" not in holds:
        pytest.skip("this kernel has no Landlock or no seccomp")
    work = canary.parent / "work"
    work.mkdir()
    work.chmod(0o777)
    module = linux.__file__
    clone = linux.CALLS["clone"][linux.machine_column()]
    done = unconfined(NATIVE.format(module=module, work=str(work), path=str(canary), clone=clone))
    answers = json.loads(done.stdout)
    own = {name: answers.pop(name) for name in ("own_signal", "own_file", "own_fork")}
    assert own == dict.fromkeys(own, 0), done.stderr
    assert answers == dict.fromkeys(answers, -1), done.stderr
    assert canary.read_text() == "alive"


# Many programs, and callers that go away.


def test_order_is_kept(isolate):
    sources = [f"import time; time.sleep({0.3 - n / 10}); assert {n} % 2" for n in range(4)]
    outcomes = run_programs(sources, ENOUGH, isolate=isolate)
    assert [outcome.status for outcome in outcomes] == ["failed", "passed"] * 2
    assert run_programs([], ENOUGH, isolate=isolate) == []


CALLER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import qtool.sandbox.run as sandbox
source = "import time; open('started', 'w'); time.sleep(60)"
sandbox.protections(isolate={isolate})
print("ready", flush=True)
sandbox.run_programs([source] * 3, sandbox.Limits(seconds=60), isolate={isolate})
"""


@LINUX
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_caller(isolate, place, signal_number):
    command = [sys.executable, "-c", CALLER.format(isolate=isolate)]
    environment = {**os.environ, "TMPDIR": str(place)}
    caller = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert caller.stdout is not None
    assert caller.stdout.readline() == b"ready\n"
    # one program's three, and the caller, which has it in its environment too
    wait_until(lambda: len(processes_of(place)) >= 4)
    caller.send_signal(signal_number)
    caller.communicate(timeout=10)
    wait_until(lambda: not processes_of(place))
    if signal_number == signal.SIGKILL:  # nobody is left to remove the directories
        for folder in place.iterdir():
            shutil.rmtree(folder)


@LINUX
def test_a_keeper_that_hangs_is_ended(isolate, place, monkeypatch):
    protections(isolate=isolate)
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.5)
    others = children()  # of other tests, such as a server that forks workers
    with ThreadPoolExecutor() as pool:
        source = "import time; time.sleep(60)"
        future = pool.submit(run_programs, [source], Limits(seconds=1.5), isolate=isolate)
        wait_until(lambda: len(processes_of(place)) >= 3)  # the keeper, the guard and the program
        os.kill(min(children() - others), signal.SIGSTOP)
        [outcome] = future.result(timeout=20)
    assert outcome == Outcome("killed", "the sandbox's own process was killed or stopped")
    wait_until(lambda: not processes_of(place))  # by the kernel, which nobody waits for


def children() -> set[int]:
    threads = Path("/proc/self/task").glob("*/children")
    return {int(pid) for thread in threads for pid in thread.read_text().split()}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sandbox_that_cannot_start_is_an_error(isolate, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(QtoolError, match=r"can't be set up: .*false ended with exit code 1"):
        run_programs(["pass"], isolate=isolate)


def test_a_refused_mount_is_an_error():
    if not sandbox._namespaces_work():
        pytest.skip("this machine allows no namespaces")
    with pytest.raises(QtoolError, match=r"can't be set up: .*mount: Invalid argument"):
        run_programs(["pass"], Limits(file_bytes=-1), isolate=True)


def test_protections_are_found_by_trying(isolate):
    holds = " ".join(protections(isolate=isolate))
    assert "resource limits" in holds
    assert ("own network namespace" in holds) == isolate
    assert ("audit hook" in holds) != isolate
    assert protections() == protections(isolate=sandbox._namespaces_work())
