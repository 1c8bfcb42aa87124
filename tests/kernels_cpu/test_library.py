"""Where the library comes from, what becomes of wrong files, and by how many threads it runs."""

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qtool import resources, settings
from qtool.core.native import building, library, threads
from qtool.core.native.library import Library, found_library
from qtool.errors import UnknownNameError
from qtool.runtime.backends._choose import choose_backend, load_backend
from qtool.runtime.backends.cpu import operators
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
ZEN = "flags : fpu avx2 fma f16c bmi1 bmi2 avx512bw avx512dq avx512vl avx512vbmi avx512_vnni\n"


def weight(rows=200, inputs=1300, seed=0, **changes):
    scheme = WeightScheme(**{"num_bits": 3, "group_size": 128, **changes})
    return random_tensor("binary_coding", scheme, Shape2D(rows, inputs), seed)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Give the test a cache of its own, and forget what was loaded."""
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    library._library.cache_clear()
    yield tmp_path / "native"
    library._library.cache_clear()


def path_of(folder):
    return folder / building.file_name(resources.kernels_dir() / "cpu", library.best_level())


def test_without_a_compiler_dense_runs_and_the_reason_is_said(empty_cache, monkeypatch):
    monkeypatch.setattr(building, "COMPILERS", ("no-such-compiler",))
    reason = load_backend("cpu").why_not(weight(), CPU)
    assert reason is not None and "C compiler" in reason and reason.endswith(".")
    assert choose_backend(weight(), CPU, None).name == "dense"
    assert not path_of(empty_cache).exists()


@pytest.mark.parametrize("complaint", ["broken", "unwritable"])
@needs_compiler
def test_what_does_not_compile_is_said_in_one_sentence(complaint, empty_cache, monkeypatch):
    if complaint == "broken":
        monkeypatch.setattr(building, "COMMON_FLAGS", ("--no-such-flag",))
    else:
        empty_cache.parent.mkdir(exist_ok=True)
        empty_cache.write_text("a file where a folder should be")
    reason = load_backend("cpu").why_not(weight(), CPU)
    assert reason is not None and reason.endswith(".") and "\n" not in reason


@needs_compiler
def test_a_file_that_is_not_what_its_name_says_is_replaced(empty_cache):
    found = found_library()
    assert isinstance(found, Library) and found.path == path_of(empty_cache)
    good = found.path.read_bytes()
    for wrong in (b"", b"no library", good.replace(fingerprint().encode(), b"0" * 20)):
        replacement = found.path.with_suffix(".new")
        replacement.write_bytes(wrong)
        replacement.rename(found.path)  # what was loaded keeps its file
        library._library.cache_clear()
        again = found_library()
        assert isinstance(again, Library)
        assert again.calls.qt_fingerprint().decode() == fingerprint()


def fingerprint():
    return building.fingerprint(resources.kernels_dir() / "cpu", library.best_level())


def test_the_name_follows_text_flags_and_machine(tmp_path, monkeypatch):
    (tmp_path / "a.c").write_text("int a;")
    first = building.file_name(tmp_path, "plain")
    (tmp_path / "a.c").write_text("int b;")
    text = building.file_name(tmp_path, "plain")
    monkeypatch.setattr(building, "COMMON_FLAGS", (*building.COMMON_FLAGS, "-g"))
    flags = building.file_name(tmp_path, "plain")
    monkeypatch.setattr(platform, "system", lambda: "Elsewhere")
    assert len({first, text, flags, building.file_name(tmp_path, "plain")}) == 4


@pytest.mark.parametrize(
    ("cpu_info", "level"),
    [
        (ZEN, "avx512"),
        (ZEN.replace("avx512vbmi", ""), "avx2"),
        (ZEN.replace("f16c", ""), "plain"),
        ("processor : 0\n", "plain"),
    ],
)
def test_level_is_what_the_processor_lists(cpu_info, level, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(cpu_info)
    monkeypatch.setattr(library, "PROCESSOR_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert library.best_level() == level


def test_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("QTOOL_CPU_LEVEL", "mmx")
    with pytest.raises(UnknownNameError, match="mmx"):
        found_library()
    assert settings.cpu_level() == "mmx"


@needs_compiler
def test_unknown_tables_are_refused(monkeypatch):
    monkeypatch.setenv("QTOOL_CPU_TABLES", "int4")
    with pytest.raises(UnknownNameError, match="int8, float32"):
        load_backend("cpu").prepare(weight(), torch.float32)
    assert settings.cpu_tables() == "int4"


@needs_compiler
@pytest.mark.parametrize(("kind", "most"), [("int16", 1e-4), ("int8", 1e-2), ("float32", 1e-6)])
@pytest.mark.parametrize("level", list(building.instruction_levels()))
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_error_of_tables_is_small_at_every_level(level, num_threads, kind, most, monkeypatch):
    if list(building.instruction_levels()).index(level) < list(building.instruction_levels()).index(
        library.best_level()
    ):
        pytest.skip("this processor has no such instructions")
    monkeypatch.setenv("QTOOL_CPU_LEVEL", level)
    monkeypatch.setenv("QTOOL_CPU_TABLES", kind)
    backend, before = load_backend("cpu"), torch.get_num_threads()
    monkeypatch.setattr(threads, "library_threads", lambda: num_threads)
    monkeypatch.setattr("qtool.runtime.backends.cpu.packing.library_threads", lambda: num_threads)
    for num_bits in range(1, 9):
        tensor = weight(seed=num_bits, num_bits=num_bits)
        x = normal(7, 1300)
        exact = x.double() @ dequantized(tensor, torch.float64).T
        error = (backend.matmul(x, backend.prepare(tensor, torch.float32)) - exact).norm(dim=1)
        assert (error <= most * exact.norm(dim=1)).all()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000"}, 2**31),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 2**31),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "no number"}, 2**31),
        ({}, 2**31),
    ],
)
def test_control_groups_limit_the_threads(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert threads.cores_of(tmp_path) == cores


def test_threads_are_those_of_torch_and_no_more_than_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for count in (1, cores, cores + 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert threads.library_threads() == min(count, cores)
    monkeypatch.setattr(threads, "_quota", lambda: 1)
    assert threads.library_threads() == 1


def test_omp_num_threads_is_obeyed():
    line = "from qtool.core.native.threads import library_threads; print(library_threads())"
    told = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", line], env=told, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def product(seed):
    backend, tensor = load_backend("cpu"), weight(seed=seed)
    return backend.matmul(normal(1, 1300), backend.prepare(tensor, torch.float32))


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr("qtool.runtime.backends.cpu.packing.library_threads", lambda: 2)


@needs_compiler
@pytest.mark.usefixtures("two_threads")
def test_two_threads_may_multiply_at_once():
    expected, wrong = {seed: product(seed) for seed in range(2)}, list[int]()

    def run(seed):
        wrong.extend(i for i in range(30) if not torch.equal(product(seed), expected[seed]))

    runners = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert wrong == []


THREADS_OF_TORCH = """
import os, torch
from tests.kernels_cpu.test_library import product
torch.set_num_threads(3)
torch.randn(999, 999) @ torch.randn(999, 999)
before = len(os.listdir("/proc/self/task"))
import qtool.runtime.backends.cpu.packing as packing
packing.library_threads = lambda: 3
product(0)
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads aren't listed here")
def test_the_helpers_are_the_threads_that_torch_has():
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_TORCH], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


def _in_a_child(expected, queue):
    queue.put(bool(torch.equal(product(0), expected)))


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_a_child_that_was_forked_after_threads_were_made_multiplies():
    expected = product(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(expected, queue))
    child.start()
    assert queue.get(timeout=60)
    child.join()
    assert child.exitcode == 0
    assert torch.equal(product(0), expected), "and so does the parent"


def test_rows_that_are_not_there_are_refused():
    backend = load_backend("cpu")
    if backend.why_not(weight(), CPU) is not None:
        pytest.skip("no library")
    table = backend.prepare(weight(), torch.float32)
    with pytest.raises(IndexError, match=r"0 \.\. 199"):
        backend.rows(torch.tensor([3, 200]), table)


def test_a_gradient_goes_through_to_the_inputs():
    backend, x = load_backend("cpu"), normal(2, 1300).requires_grad_()
    if backend.why_not(weight(), CPU) is not None:
        pytest.skip("no library")
    backend.matmul(x, backend.prepare(weight(), torch.float32)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], dequantized(weight()).sum(0), rtol=1e-4, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_by_tables_and_by_blocks_of_rows_are_the_same(dtype, monkeypatch):
    backend, tensor, x = load_backend("cpu"), weight(rows=1100), normal(70, 1300).to(dtype)
    prepared, exact = backend.prepare(tensor, dtype), x.double() @ dequantized(tensor).double().T
    for chosen in (True, False):
        monkeypatch.setattr(operators, "prefers_tables", lambda *_args, chosen=chosen: chosen)
        error = (backend.matmul(x, prepared) - exact).norm() / exact.norm()
        assert error <= (1e-4 if dtype == torch.float32 else 5e-3)


def test_costs_decide_between_tables_and_blocks():
    def of(num_bits, level, tables="int16"):
        return SimpleNamespace(table_work=num_bits, level=level, tables=tables)

    few, many = of(2, "avx512"), of(8, "avx512")
    decided = [
        operators.prefers_tables(each, tokens, dtype)
        for each in (few, many)
        for tokens in (16, 100, 20_000)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert decided[:6] == [True, True, True, True, True, False]
    assert decided[6:] == [True, True, True, False, False, False]
    for slow in (of(2, "plain"), of(2, "avx512", "float32")):
        assert operators.prefers_tables(slow, 16, torch.float32)
        assert not operators.prefers_tables(slow, 17, torch.float32)
