"""The examples of the documentation run, on a tiny model in place of the demo model."""

import shutil

import pytest

import qtool.methods
from qtool.stages.plan import load_method
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
    """Return whether a command of the quickstart needs neither a card nor lm-eval."""
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


def test_method_of_the_page_on_methods_does_what_the_page_says(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs/adding-a-method.md"
    method, trial = blocks(page, "python")
    (tmp_path / "rtn_clip.py").write_text(method, encoding="utf-8")
    monkeypatch.setattr(qtool.methods, "__path__", [*qtool.methods.__path__, str(tmp_path)])
    exec(compile(trial, str(page), "exec"), {})
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    said = page.read_text(encoding="utf-8")
    for name, error in printed.items():
        assert f"{float(error):.3f} for `{name}`" in said
    assert load_method("rtn_clip").num_bits == range(1, 9)


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("docs/adding-a-backend.md", "qtool/runtime/backends/dense.py"),
        ("docs/adding-a-model.md", "qtool/modeling/adapters/llama.py"),
    ],
)
def test_files_that_a_page_shows_are_those_of_the_product(page, file):
    assert (ROOT / file).read_text(encoding="utf-8") in blocks(ROOT / page, "python")
