"""`qtool report` as a user calls it."""

import json
import shutil

import pytest

from qtool.checkpoint.marks import foreign_entries
from tests.cli.conftest import Cli

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def out_dir(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "out")


def test_page_lies_in_the_directory_and_belongs_to_it(cli: Cli, llama, out_dir):
    done = cli("report", out_dir)
    assert done.code == 0, done.err
    page = out_dir / "report.html"
    assert "report.html" in done.out
    assert "Bits of each layer" in page.read_text()
    assert foreign_entries(out_dir) == []
    before = page.read_bytes()
    assert cli("report", out_dir).code == 0
    assert page.read_bytes() == before
    again = cli("quantize", "--method", "rtn", "--overwrite", "--no-calibration", llama, out_dir)
    assert again.code == 0, again.err
    assert not page.exists()


def test_other_files_are_never_replaced(cli: Cli, out_dir, tmp_path):
    for target in (out_dir / "config.json", out_dir / "README.md", tmp_path / "mine.html"):
        target.touch()
        before = target.read_bytes() or b"<html>"
        target.write_bytes(before)
        done = cli("report", out_dir, "--output", target)
        assert done.code == 1
        assert "isn't a page of `qtool report`" in done.err
        assert target.read_bytes() == before


def test_several_are_compared_and_named_apart(cli: Cli, out_dir, tmp_path):
    (tmp_path / "b").mkdir()
    other = shutil.copytree(out_dir, tmp_path / "b" / "out")
    done = cli("report", out_dir, other, "--output", tmp_path / "both.html")
    assert done.code == 0, done.err
    page = (tmp_path / "both.html").read_text()
    assert "Side by side" in page
    assert all(f"<h2>out ({number})</h2>" in page for number in (1, 2))


def test_sweep_stands_for_its_sizes(cli: Cli, out_dir, tmp_path):
    sizes = []
    for number, name in enumerate(("uniform=3", "average_bits=3.5"), 1):
        shutil.copytree(out_dir, tmp_path / "sweep" / name)
        quality = {"kl_text": 0.1 / number, "kl_chats": None, "perplexity": 20.0 + number}
        sizes.append({"name": name, "block_bits": 3.5, "disk_bytes": 1000, **quality})
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"sizes": sizes, "failures": {}}))
    done = cli("report", tmp_path / "sweep")
    assert done.code == 0, done.err
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "0.1000" in page
    assert "Divergence on text over size on disk, MB" in page


def test_measurements_may_lie_elsewhere(cli: Cli, llama, out_dir, text_file, tmp_path):
    result = tmp_path / "eval.json"
    options = ("--dataset", text_file, "--context-length", 32, "--windows", 2)
    done = cli("eval", out_dir, "--baseline", llama, *options, "--json", result)
    assert done.code == 0, done.err
    assert cli("report", out_dir).code == 0
    assert "Closeness to the original" not in (out_dir / "report.html").read_text()
    done = cli("report", out_dir, "--measured", result)
    assert done.code == 0, done.err
    assert "Closeness to the original" in (out_dir / "report.html").read_text()
    shutil.copy(result, out_dir / "eval.json")
    (out_dir / "report.html").unlink()
    assert cli("report", out_dir).code == 0
    assert "Closeness to the original" in (out_dir / "report.html").read_text()
    wrong = cli("report", out_dir, "--measured", out_dir / "config.json")
    assert wrong.code == 1
    assert "isn't a result of" in wrong.err
    assert cli("report", out_dir, out_dir, "--measured", result).code == 2


@pytest.mark.parametrize(("name", "words"), [("none", "No directory"), (".", "nothing of a run")])
def test_what_is_no_run_is_one_line(cli: Cli, tmp_path, name, words):
    done = cli("report", tmp_path / name)
    assert done.code == 1
    assert words in done.said[-1]
    assert not (tmp_path / "report.html").exists()
