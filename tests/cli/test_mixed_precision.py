"""Bits per layer under a budget, as a user asks for them."""

import json

import pytest

from qtool.checkpoint.reader import CheckpointReader
from tests.cli.conftest import Cli

pytest.importorskip("matplotlib")


@pytest.fixture
def options(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    calibration = ("num_samples=12", "sequence_length=32", f"dataset={text_file}")
    settings = [word for text in calibration for word in ("--set", f"calibration.{text}")]
    return ["--method", "rtn", "--group-size", "32", *settings]


def widths(directory) -> list[int]:
    layers = CheckpointReader(directory).manifest.layers
    return [entry.scheme.num_bits for entry in layers.values()]


def test_average_bits_are_explained_and_then_kept(cli: Cli, llama, options, tmp_path):
    command = ["quantize", *options, "--average-bits", "3.6", llama, tmp_path / "out"]
    dry = cli(*command, "--dry-run")
    assert dry.code == 0, dry.err
    assert "gain per MiB" in dry.out
    assert "of the 3.6 that may be" in dry.out
    assert not (tmp_path / "out").exists()
    planned = json.loads(cli(*command, "--dry-run", "--json", "-").out)
    done = cli(*command, "--json", "-")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["choosing"] == planned["choosing"]
    assert result["average_bits"] == pytest.approx(planned["average_bits"])
    assert 3.4 < result["average_bits"] <= 3.6
    printed = cli(*command, "--overwrite").out
    assert "bits chosen, on average" in printed
    assert widths(tmp_path / "out") == [layer["num_bits"] for layer in planned["layers"]]
    assert len(set(widths(tmp_path / "out"))) > 1


def test_a_sweep_has_a_directory_for_each_size_and_goes_on(cli: Cli, llama, options, tmp_path):
    out_dir = tmp_path / "sizes"
    command = ["quantize", *options, "--sweep", "average_bits=3.2,4.0", llama, out_dir]
    first = cli(*command)
    assert first.code == 0, first.err
    names = ["average_bits=3.2", "average_bits=4", "uniform=2", "uniform=3", "uniform=4"]
    assert sorted(path.name for path in out_dir.iterdir() if path.is_dir()) == names
    assert set(widths(out_dir / "uniform=3")) == {3}
    table = json.loads((out_dir / "sweep.json").read_text())
    sizes = {size["name"]: size for size in table["sizes"]}
    assert sorted(sizes) == names
    assert table["failures"] == {}
    assert 3.0 < sizes["average_bits=3.2"]["block_bits"] <= 3.2
    by_size = sorted(sizes.values(), key=lambda size: size["disk_bytes"])
    assert by_size[0]["on_front"]
    assert (out_dir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = (out_dir / "average_bits=4" / "model.safetensors").stat().st_mtime_ns
    again = cli(*command)
    assert again.code == 1
    assert "--overwrite" in again.err or "--resume" in again.err
    resumed = cli(*command, "--resume", "--json", "-")
    assert resumed.code == 0, resumed.err
    assert (out_dir / "average_bits=4" / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads(resumed.out)["sizes"] == table["sizes"]


def test_a_size_that_fails_loses_no_other(cli: Cli, llama, options, tmp_path, monkeypatch):
    from qtool import pipeline
    from qtool.errors import MethodError

    inner = pipeline.sweep.__globals__["quantize"]

    def failing(model, out_dir, recipe, **places):
        if out_dir.name == "uniform=3":
            raise MethodError("a layer is odd.")
        return inner(model, out_dir, recipe, **places)

    monkeypatch.setitem(pipeline.sweep.__globals__, "quantize", failing)
    out_dir = tmp_path / "sizes"
    done = cli("quantize", *options, "--sweep", "average_bits=3.2", llama, out_dir)
    assert done.code == 1
    assert "1 sizes failed, the first uniform=3: a layer is odd." in done.said[-1]
    assert "average_bits=3.2" in done.out
    assert widths(out_dir / "uniform=4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--average-bits", "2"], "average_bits is 2, and the smallest choices take 2.563"),
        (["--sweep", "average_bits=2,4"], "average_bits is 2, and the smallest choices take"),
        (["--average-bits", "0"], "choosing.average_bits is 0.0; it should be greater than 0"),
        (["--sweep", "num_bits=2,4"], "--sweep is 'num_bits=2,4'; it takes average_bits=A,B,..."),
        (["--sweep", "average_bits=3,3"], "each a number and once"),
        (["--sweep", "average_bits=3", "--average-bits", "3"], "exclude each other"),
        (["--sweep", "average_bits=3", "--dry-run"], "--sweep and --dry-run exclude each other"),
        (["--average-bits", "3", "--no-calibration"], "choosing needs calibration data"),
        (["--average-bits", "3", "--set", "choosing.counts=strict"], "section 'embedding'"),
    ],
)
def test_what_is_impossible_is_refused(cli: Cli, llama, options, tmp_path, given, message):
    if "--no-calibration" in given:
        options = options[:4]
    done = cli("quantize", *options, *given, llama, tmp_path / "out")
    assert done.code == 1
    assert message in done.said[-1]
    assert not (tmp_path / "out").exists()
