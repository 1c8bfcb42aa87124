"""`qtool export` and `qtool import`: one line says what came of it, or what is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtool import pipeline
from qtool.checkpoint.shards import open_shards
from qtool.errors import OutputError


def test_one_line_says_what_was_written_and_who_has_compared_it(cli, exported, tmp_path):
    done = cli("export", exported / "w4", tmp_path / "dense", "--target", "dense")
    assert done.code == 0, done.err
    assert "14 layers and 7 other tensors read back to the bit by qtool's own reader" in done.out


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_without_a_dtype_floats_are_those_of_the_configuration(stored, exported, tmp_path):
    copy = Path(shutil.copytree(exported / "w4", tmp_path / "w4"))
    config = json.loads((copy / "config.json").read_text())
    config.pop("torch_dtype", None)
    (copy / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    pipeline.export(copy, tmp_path / "dense", "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == stored
    kinds = {spec.dtype for spec in open_shards(tmp_path / "dense").specs.values()}
    assert kinds == {{"float16": "F16", "bfloat16": "BF16"}[stored]}


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors", "dense"])
def test_comparing_tells_how_far_it_is(target, exported, tmp_path):
    told: list[Any] = []
    pipeline.export(exported / "w4", tmp_path / "out", target, emit=told.append)
    compared = [one for one in told if one.what.startswith("comparing")]
    assert len(compared) > 14
    assert (compared[-1].done, compared[-1].total) == (len(compared), len(compared))


def test_a_folder_of_a_name_that_work_could_have_is_not_lost(exported, tmp_path):
    for name in ("dense.partial", ".dense.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="isn't the work of a run of qtool"):
        pipeline.export(exported / "w4", tmp_path / "dense", "dense")
    assert {path.name for path in tmp_path.rglob("*.txt")} == {"thesis.txt"}
    shutil.rmtree(tmp_path / "dense.partial")
    pipeline.export(exported / "w4", tmp_path / "dense", "dense")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", ".dense.partial"}
    assert (tmp_path / ".dense.partial/thesis.txt").read_text() == "mine"


def test_two_exports_to_one_place_do_not_meet(exported, tmp_path):
    refused: list[Any] = []

    def second(progress: Any) -> None:
        if progress.what == "writing" and not refused:
            with pytest.raises(OutputError, match="Another run is writing") as found:
                pipeline.export(exported / "w4", tmp_path / "dense", "dense")
            refused.append(found)

    result = pipeline.export(exported / "w4", tmp_path / "dense", "dense", emit=second)
    assert refused
    assert result.compared.layers == 14
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_json_says_what_was_done(cli, exported, tmp_path):
    done = cli("import", exported / "gptq", tmp_path / "in", "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == "gptq"
    target = ("--target", "compressed-tensors", "--json", "-")
    done = cli("export", tmp_path / "in", tmp_path / "ct", *target)
    assert done.code == 0, done.err
    assert json.loads(done.out)["layers"] == 14


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "w4", "out", "--target", "gtpq"), "Did you mean 'gptq'?"),
        (("export", "w4", "out", "--target", "awq"), "awq is only read. Targets are"),
        (("export", "w4", "out", "--target", "gptq", "--engine", "vllm@9"), "vllm@0.33 is"),
        (("export", "gptq", "out", "--target", "dense"), "becomes a checkpoint by `qtool import`"),
        (("export", "nowhere", "out", "--target", "dense"), "No checkpoint directory"),
        (("export", "w4", "gptq", "--target", "gptq"), "exists, and nothing is replaced"),
        (("import", "w4", "out"), "is a checkpoint of qtool already"),
        (("import", "gptq", "w4"), "exists. Pass --overwrite to replace it."),
        (("import", "gptq", "gptq/in"), "is the model that is read, or lies in it"),
        (
            ("quantize", "--target", "gptq", "--sweep", "average_bits=3", "m", "out"),
            "--target goes",
        ),
    ],
)
def test_what_is_wrong_is_one_line(cli, exported, monkeypatch, arguments, words):
    monkeypatch.chdir(exported)
    done = cli(*arguments)
    assert done.code == 1
    assert words in done.err
    assert not (exported / "out").exists()


def test_damaged_model_is_one_line(cli, exported, tmp_path):
    (tmp_path / "config.json").write_text((exported / "gptq" / "config.json").read_text())
    save_file({"x.qweight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    for command in (("import", tmp_path, tmp_path.with_name("in")), ("eval", tmp_path)):
        done = cli(*command)
        assert done.code == 1
        assert "x is quantized there, and the model" in done.err
        assert "Traceback" not in done.err
