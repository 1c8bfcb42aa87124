"""The examples of the documentation run, on a tiny model in place of the demo model."""

import shutil

import pytest

from tests.cli.conftest import Cli
from tests.docs.pages import Line, blocks, command_lines
from tests.helpers import ROOT

FEW = ["--set", "calibration.num_samples=4", "--set", "calibration.sequence_length=32"]
SMALL_EVAL = ["--context-length", "64"]
QUICKSTART = ROOT / "docs/quickstart.md"


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """Work in a folder with the checkpoint that the examples call smollm2-w3."""
    shutil.copytree(checkpoint, tmp_path / "smollm2-w3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_cheap(line: Line) -> bool:
    """Return whether a command of the quickstart needs no card, no lm-eval, and ends by itself."""
    if line.words[1] == "serve":
        return False  # test_serving.py runs it
    return line.words[1] == "calibrate" or not {"--tasks", "--gpu", "--synthetic"} & set(line.words)


def small(line: Line, model: str) -> list[str]:
    """Return the command for a tiny model, with less to do."""
    words = [model if word == "demo:smollm2" else word for word in line.words[1:]]
    if words[0] == "eval":
        return [*words, *SMALL_EVAL]
    if words[0] == "calibrate":
        return [*words, "--set", "calibration.num_tokens=2000"]
    if words[0] == "quantize" and "--calibration" not in words:
        return [*words, *FEW, "--overwrite"]
    return words


def test_quickstart_works_from_top_to_bottom(cli: Cli, tiny, folder):
    lines = [line for line in command_lines(QUICKSTART) if is_cheap(line)]
    assert len(lines) > 7
    model = str(tiny("llama"))
    for line in lines:
        done = cli(*small(line, model))
        assert done.code == 0, f"{line}: {done.err}"
    assert (folder / "samples" / "calibration.json").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/format.md"])
def test_python_runs(page, llama, folder, capsys):
    for block in blocks(ROOT / page, "python"):
        text = block.replace("demo:smollm2", str(llama)).replace(
            '["weights.scheme.group_size=192"]',
            '["calibration.num_samples=4", "calibration.sequence_length=32"]',
        )
        shutil.rmtree(folder / "smollm2-w3.new", ignore_errors=True)
        text = text.replace('Path("smollm2-w3"), recipe', 'Path("smollm2-w3.new"), recipe')
        exec(compile(text, page, "exec"), {})  # the page's own words
    capsys.readouterr()
