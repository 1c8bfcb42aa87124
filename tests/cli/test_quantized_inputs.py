"""A model whose inputs of linears are quantized, as a user calls it."""

import json

import pytest

from qtool.checkpoint.reader import CheckpointReader
from tests.cli.conftest import Cli
from tests.cli.test_end_to_end import SHORT, settings

STATIC = ("activations.granularity=tensor", "activations.range=percentile")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("activations.num_bits=6",), "6 bits per token"),
        ((*STATIC, *SHORT), "8 bits per tensor"),
    ],
    ids=["token", "tensor"],
)
def test_it_is_quantized_inspected_evaluated_and_timed(cli: Cli, llama, tmp_path, keys, said):
    options = ["--method", "rtn", "--group-size", "32", *settings(*keys)]
    done = cli("quantize", *options, llama, tmp_path / "out")
    assert done.code == 0, done.err
    manifest = CheckpointReader(tmp_path / "out").manifest
    assert manifest.format_version == 2
    assert all(entry.activation for entry in manifest.layers.values())
    assert said in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    shown = " ".join(cli("inspect", tmp_path / "out").out.split())
    assert f"inputs {said}".replace("bits", "bit") in shown
    entry = next(
        iter(json.loads(cli("inspect", tmp_path / "out", "--json", "-").out)["layers"].values())
    )
    assert entry["activation"]["granularity"] == said.rpartition(" ")[2]
    for command in (
        ("eval", tmp_path / "out", "--windows", 2, "--context-length", 64, "--json", "-"),
        ("bench", tmp_path / "out", "--json", "-"),
    ):
        ran = cli(*command)
        assert ran.code == 0, ran.err
        json.loads(ran.out)


def test_a_section_that_contradicts_itself_is_refused(cli: Cli, llama, tmp_path):
    for keys, said in (
        (("activations.range=mse",), "granularity tensor"),
        ((*STATIC, "activations.clip_ratio=0.5"), "granularity token"),
        (("activations.num_bits=9",), "num_bits"),
    ):
        done = cli("quantize", "--method", "rtn", *settings(*keys), llama, tmp_path / "out")
        assert done.code == 1
        assert said in done.err
    done = cli(
        "quantize",
        "--method",
        "rtn",
        "--no-calibration",
        *settings(*STATIC),
        llama,
        tmp_path / "out",
    )
    assert done.code == 1
    assert "granularity is 'tensor'" in done.err
    assert not (tmp_path / "out").exists()
