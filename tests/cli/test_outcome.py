"""Every way out: one line, the documented exit code, before the work where that is possible."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qtool import pipeline
from qtool.cli.outcome import explain
from tests.cli.conftest import Cli, Done
from tests.cli.test_errors import one_line


class OutOfMemoryError(RuntimeError):
    """As torch's own, by name."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ["Out of memory", "--device cpu"]),
        (OutOfMemoryError("CUDA"), ["Out of memory"]),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), ["Out of memory"]),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), ["disk is full where /a/b is"]),
        (RuntimeError("oops\n  twice"), ["Internal error", "RuntimeError: oops twice", "debug"]),
    ],
)
def test_what_nobody_explained_is_one_line(cli: Cli, llama, monkeypatch, tmp_path, error, words):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(pipeline, "quantize", fail)
    one_line(cli("quantize", llama, tmp_path / "out"), *words)


def test_other_errors_of_the_system_are_no_full_disk():
    assert "Internal error" in explain(OSError(errno.EIO, "I/O error"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["eval", "m", "--baseline", "a", "--baseline", "b"], "--baseline is given twice"),
        (["quantize", "m", "o", "--bits", "3", "--bits", "4"], "--bits is given twice"),
        (["quantize", "m", "o", "--json", "a", "--json=b"], "--json is given twice"),
        (["eval", "m", "--device", "gpu"], "cuda:1 for the second card"),
        (["bench", "m", "--device", "cuda:x"], "cuda:1 for the second card"),
        (["bench", "m", "--gpu", "--device", "cpu"], "doesn't go with --gpu"),
    ],
)
def test_options_that_can_not_be_meant_are_usage_errors(cli: Cli, command, words):
    done = cli(*command)
    assert done.code == 2
    assert words in " ".join(done.err.replace("│", " ").split())


def test_lists_and_switches_may_be_given_twice(cli: Cli, llama, tmp_path):
    many = ["--set", "seed=1", "--set", "weights.scheme.group_size=32"]
    done = cli(
        *("quantize", "--method", "rtn", "--dry-run", "--dry-run", *many, "--json", "-"),
        *(llama, tmp_path / "o"),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["layers"][0]["group_size"] == 32


def test_device_that_is_not_there_is_one_line(cli: Cli, llama, tmp_path):
    command = ["quantize", "--method", "rtn", llama, tmp_path / "o", "--device", "cuda:99"]
    one_line(cli(*command), "--device is cuda:99", "sees")


def test_device_is_where_the_work_is_done(cli: Cli, llama, tmp_path):
    command = ["quantize", "--method", "rtn", llama, tmp_path / "o", "--device", "cpu"]
    done = cli(*command, "--json", "-")
    assert json.loads(done.out)["device"] == "cpu"


@pytest.mark.parametrize("command", ["quantize", "calibrate", "eval", "bench"])
def test_result_that_could_not_be_written_is_refused_before_the_work(
    cli: Cli, monkeypatch, llama, tmp_path, command
):
    for name in ("quantize", "calibrate", "evaluate", "bench"):
        monkeypatch.setattr(pipeline, name, lambda *_args, **_kwargs: pytest.fail("worked"))
    places = [tmp_path / "out"] if command in ("quantize", "calibrate") else []
    for target in (tmp_path / "no" / "file.json", tmp_path):
        one_line(cli(command, llama, *places, "--json", target), "Can't write")
    assert list(tmp_path.iterdir()) == []


def test_result_that_is_there_stays_until_the_new_one_is_written(cli: Cli, tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    assert cli("bench", tmp_path / "nothing", "--json", target).code == 1
    assert target.read_text() == "old"


def test_calibration_is_not_replaced_unasked(cli: Cli, llama, tmp_path):
    few = ["--set", "calibration.num_samples=4", "--set", "calibration.sequence_length=16"]
    command = ["calibrate", *few, llama, tmp_path / "cal"]
    assert cli(*command).code == 0
    before = (tmp_path / "cal" / "samples.safetensors").read_bytes()
    one_line(cli(*command), "--overwrite")
    assert (tmp_path / "cal" / "samples.safetensors").read_bytes() == before
    assert cli(*command, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "nowhere"], "nowhere is no calibration directory"),
        (["--set", "calibration.dataset=no.txt"], "No file no.txt"),
        (["--set", "calibration.dataset=wikitext3"], "wikitext3"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_missing_data_are_found_before_the_model_is_opened(
    cli: Cli, monkeypatch, llama, tmp_path, options, words, dry
):
    for name in ("quantize", "plan"):
        monkeypatch.setattr(pipeline, name, lambda *_args, **_kwargs: pytest.fail("opened"))
    monkeypatch.chdir(tmp_path)
    one_line(cli("quantize", "--method", "gptq", *options, *dry, llama, "out"), words)


def test_reader_that_stops_reading_is_no_error_message():
    command = f"{sys.executable} -m qtool recipes | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_stdout_is_one_line():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m qtool recipes > /dev/full"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: The disk is full")


def test_texts_are_left_out_if_asked(cli: Cli, llama, checkpoint, text_file):
    options = ["--dataset", text_file, "--context-length", "64", "--windows", "3", "--no-texts"]
    done = cli("eval", checkpoint, "--baseline", llama, *options, "--json", "-")
    agreement = json.loads(done.out)["agreement"]
    assert agreement["kl_divergence"] > 0
    assert agreement["greedy"] == []


def test_bench_says_that_no_original_is_beside_it(cli: Cli, checkpoint):
    done = cli("bench", checkpoint)
    assert done.code == 0, done.err
    assert "No original is beside it" in done.out
    assert "--baseline MODEL" in done.out


def test_error_of_the_system_names_its_file():
    error = PermissionError(errno.EACCES, "Permission denied", "/a/b")
    assert explain(error) == "/a/b can't be read or written: Permission denied."


def refused(done: Done, *words: str) -> None:
    one_line(done, *words)
    assert "Internal error" not in done.err


@pytest.mark.parametrize("long", ["x" * 300, "x" * 300 + ".txt", "x" * 300 + ".gguf"])
def test_name_too_long_for_a_file_is_one_line(cli: Cli, llama, tmp_path, long):
    out_dir = tmp_path / "out"
    quantize = ["quantize", "--method", "rtn"]
    refused(cli(*quantize, "--calibration", tmp_path / long, llama, out_dir))
    refused(cli(*quantize, "--set", f"calibration.dataset={long}", llama, out_dir))
    refused(cli(*quantize, "--recipe", f"{long}.yaml", llama, out_dir), "long")
    refused(cli(*quantize, "--json", tmp_path / long, llama, out_dir), "long")
    refused(cli(*quantize, llama, tmp_path / long), "long")
    refused(cli(*quantize, long, out_dir))
    refused(cli("calibrate", llama, tmp_path / long))
    refused(cli("inspect", tmp_path / long))
    refused(cli("bench", tmp_path / long))
    refused(cli("eval", llama, "--dataset", tmp_path / long))


@pytest.mark.parametrize("name", ["loop", "loop/file"])
def test_link_in_a_circle_is_one_line(cli: Cli, llama, tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    refused(cli("inspect", tmp_path / name))
    refused(cli("inspect", tmp_path, "--json", tmp_path / name))
    refused(cli("calibrate", llama, tmp_path / name))
    refused(cli("quantize", "--method", "rtn", llama, tmp_path / name))


@pytest.mark.parametrize("passes", [True, False])
def test_an_interrupt_that_a_library_turned_into_another_error_is_one(
    cli: Cli, llama, tmp_path, monkeypatch, passes
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def swallow(*_args, **_kwargs):
        try:
            if passes:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise ImportError("Could not import module 'LlamaConfig'")

    monkeypatch.setattr(pipeline, "quantize", swallow)
    done = cli("quantize", llama, tmp_path / "out")
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    said = "Interrupted. Finished layers are kept" if passes else "Could not import"
    assert (done.code, said in done.said[-1]) == (130 if passes else 1, True)


def test_an_interrupt_while_the_program_starts_is_one_line():
    code = (
        "import sys\n"
        "class Late:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Late())\n"
        "from qtool.__main__ import start_program\n"
        "start_program()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Error: Interrupted.\n")
