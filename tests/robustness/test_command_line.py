"""Any words behind `qtool`: an exit code of 0, 1 with one line, or 2; never a traceback."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.robustness.child import run_apart
from tests.robustness.fuzzing import fuzz, sizes

SMALL = "--set calibration.num_samples=4 --set calibration.sequence_length=24"
COMMANDS = (
    "quantize --method rtn --bits 4 --group-size 32 model new",
    "quantize --recipe rtn-w4g128 --group-size 32 --dry-run model new",
    f"quantize --method gptq --group-size 32 --calibration data {SMALL} model new",
    "quantize --method bcq --bits 2 --group-size 32 --no-calibration --overwrite model checkpoint",
    f"calibrate --dataset words.txt {SMALL} model new",
    "eval checkpoint --dataset words.txt --context-length 32 --windows 1",
    "eval checkpoint --baseline model --dataset words.txt --context-length 32 --windows 1",
    "inspect checkpoint",
    "inspect checkpoint --json -",
    "recipes",
    "methods",
)
"""Good ones; each ends within a second on a tiny model."""
OPTIONS = (
    *("--method", "--bits", "--group-size", "--recipe", "--set", "--calibration", "--json"),
    *(
        "--no-calibration",
        "--strict",
        "--overwrite",
        "--resume",
        "--dry-run",
        "--dtype",
        "--backend",
    ),
    *("--dataset", "--context-length", "--windows", "--baseline", "--limit", "--num-fewshot"),
    *(
        "--batch-size",
        "--max-length",
        "--seed",
        "--samples",
        "--gen-kwargs",
        "--markdown",
        "--cache",
    ),
    *("--no-cache", "--data-dir", "--apply-chat-template", "--lengths", "--device", "--gpu"),
    *("--synthetic", "--kernel", "--peers", "--plot", "--verify", "--help", "--version", "--x"),
    *("--", "-", "-x", "--bits=", "--set=", "--json=-", "--install-completion=x"),
)
VALUES = (
    *("0", "1", "-1", "3", "9", "1.5", "1e3", "9" * 20, "9" * 5000, "nan", "", " ", "row", "auto"),
    *("model", "checkpoint", "data", "new", "words.txt", "nowhere", "empty", ".", "..", "-", "/"),
    *("rtn", "gptq", "bcq", "rtm", "rtn-w4g128", "no.yaml", "float16", "float32", "float8", "cuda"),
    *(
        "cpu",
        "cuda:99",
        "reference",
        "dense",
        "demo:x",
        "x.gguf",
        "hub:x",
        "hub:",
        "wikitext2-test",
    ),
    *("weights.scheme.num_bits=3", "calibration=null", "seed=2001-99-99", "a=b", "=", "seed"),
    *("calibration.num_samples=5", "weights.options={}", "weights.overrides=[]", "embedding={}"),
    *("new/out", "words.txt/x", "fifo", "a" * 300, "a" * 5000, "\udcff", "日本語", "\x1b[31m"),
    *("[bold]", "[/]", "\n", "x\ny", "%s", "{}", "--bits", "mmlu", "no_such_task", "/dev/full"),
)
SETTINGS = (
    *(
        "seed=2001-99-99",
        "seed=!!bool x",
        "seed=[[",
        "seed=1e400",
        "seed=" + "9" * 5000,
        "x=&a [*a]",
    ),
    *(
        "weights=null",
        "weights.scheme=4",
        "weights.overrides.0.match=x",
        "weights.method=bcq",
        "=x",
    ),
    *("weights.options.damping=5", "calibration.num_samples=3", "calibration.dataset=words.txt"),
    *("calibration.sequence_length=7", "calibration.dataset=fifo", "calibration=", "embedding={}"),
    *("head={method: rtn}", "weights.scheme.group_size=null", "description=\ud83d", "a.b.c=d"),
)
WORDS = st.sampled_from(VALUES) | st.text(max_size=8)


@dataclass(frozen=True, slots=True)
class Line:
    """The words behind `qtool`."""

    words: tuple[str, ...]

    def __repr__(self) -> str:
        return " ".join(repr(word)[:50] if set(word) - PLAIN else word for word in self.words)


PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=.,/:")


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """Draw a good command with words added, replaced, dropped or swapped."""
    words = draw(st.sampled_from(COMMANDS)).split()
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        place = draw(st.integers(0, len(words)))
        action = draw(st.sampled_from(["option", "set", "replace", "drop", "word", "swap"]))
        if action == "option":
            words[place:place] = [draw(st.sampled_from(OPTIONS)), draw(WORDS)]
        elif action == "set":
            words[place:place] = ["--set", draw(st.sampled_from(SETTINGS))]
        elif action == "word":
            words.insert(place, draw(st.sampled_from(OPTIONS) | WORDS))
        elif action == "replace":
            words[place : place + 1] = [draw(WORDS)]
        elif action == "drop":
            del words[place : place + 1]
        else:
            words[place : place + 2] = reversed(words[place : place + 2])
    return Line(tuple(word.replace("\x00", "") for word in words))


@pytest.fixture(scope="module")
def folder(llama, checkpoint, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(llama, folder / "model")
    shutil.copytree(checkpoint, folder / "checkpoint")
    shutil.copyfile(text_file, folder / "words.txt")
    (folder / "empty").mkdir()
    return folder


def called(line: Line, folder: Path, target: Path) -> str | None:
    """Run a command in a copy of the folder, and return what is wrong with how it ended."""
    from qtool.cli.app import main

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    os.mkfifo(target / "fifo")
    out, err = target.with_name("stdout"), target.with_name("stderr")
    sys.argv = ["qtool", *line.words]
    code: object = 0
    with (
        contextlib.chdir(target),
        out.open("w", encoding="utf-8") as stdout,
        err.open("w", encoding="utf-8") as stderr,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return complaint(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"), line)


def complaint(code: object, out: str, err: str, line: Line) -> str | None:
    """Return what is wrong with an exit code and what was printed."""
    errors = [text for text in err.splitlines() if text.startswith("Error: ")]
    last = err.rstrip().rpartition("\n")[2]
    if "Traceback (most recent call last)" in err + out:
        return f"a traceback: {last}"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if code == 1 and (len(errors) != 1 or last != errors[0]):
        return f"{len(errors)} lines of error: {err[-200:]!r}"
    if code == 1 and "Internal error" in errors[0]:
        return errors[0][:300]
    if code == 0 and errors:
        return f"exit code 0 and {errors[0][:200]}"
    if code == 0 and "--json -" in " ".join(line.words) and "--help" not in line.words:
        json.loads(out)
    return None


@pytest.fixture(scope="module")
def warm(folder, tmp_path_factory):
    """Run the good commands here: they must work, and import what the children need."""
    target = tmp_path_factory.mktemp("warm") / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        for words in COMMANDS:
            line = Line(tuple(words.replace("--calibration data ", "").split()))
            assert called(line, folder, target) is None, words


@sizes(40)
@pytest.mark.usefixtures("warm")
def test_any_command_ends_in_a_result_or_one_line(size, folder, tmp_path):
    def check(line: Line) -> str | None:
        outcome = run_apart(called, line, folder, tmp_path / "here")
        return outcome.complaint or outcome.value

    fuzz(lines(), check, size)
