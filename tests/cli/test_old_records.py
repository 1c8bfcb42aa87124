"""Models that only a file of an old program's own calls quantized: each command says the same."""

import json
import shutil

import pytest
import torch

from qtool import pipeline
from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from tests.helpers import dequantized

COMMANDS = (
    "inspect {m}",
    "bench {m}",
    "bench {w4} --baseline {m}",
    "export {m} {new} --target gptq",
    "import {m} {new}",
    "adapt {m} {pairs} {new}",
    "train {m} {pairs} {new}",
    "eval {m} --dataset {text}",
    "eval {w4} --baseline {m} --dataset {text}",
    "compare {m} {w4}",
    "calibrate {m} {new} --dataset {text}",
    "quantize --method rtn --bits 4 {m} {new}",
    "quantize --method rtn --bits 4 --dry-run {m} {new}",
    "serve {m}",
    "chat {m}",
    "grid {new} --model {m} --recipe rtn-w4g128",
)
RECORDS = {
    "gptq": ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "awq": ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True}),
}


@pytest.fixture
def old(exported, tmp_path):
    """Return a function that makes a model as old versions of a program left it."""

    def make(method, weights="model.safetensors"):
        directory = tmp_path / "old"
        shutil.copytree(exported / "gptq", directory)
        (directory / "quantize_config.json").unlink()
        name, record = RECORDS[method]
        (directory / name).write_text(json.dumps(record))
        config = json.loads((directory / "config.json").read_text())
        del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "model.safetensors").rename(directory / weights)
        return directory

    return make


@pytest.mark.parametrize("weights", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
def test_every_command_says_what_it_is_and_what_to_do(
    cli, exported, old, text_file, tmp_path, weights
):
    directory, answers = old("gptq", weights), {}
    places = {"w4": exported / "w4", "new": tmp_path / "new", "pairs": tmp_path / "pairs.jsonl"}
    names = {"m": directory, "text": text_file, **places}
    names["pairs"].write_text(json.dumps({"prompt": "a b", "completion": "c"}))
    for command in COMMANDS:
        done = cli(*command.format(**names).split())
        answers[command] = done.code, done.said[-1]
    assert {*answers.values()} == {(1, next(iter(answers.values()))[1])}, answers
    said = next(iter(answers.values()))[1]
    assert f"{directory / 'quantize_config.json'} says how another program quantized it" in said
    assert '"quant_method": "gptq"' in said
    assert f"`qtool import {directory}`" in said
    assert not (tmp_path / "new").exists()


def test_what_is_said_is_enough_to_import_it(exported, old, tmp_path):
    directory = old("gptq")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {**RECORDS["gptq"][1], "quant_method": "gptq"}
    (directory / "config.json").write_text(json.dumps(config))
    pipeline.import_model(Location(directory), tmp_path / "in")
    ours, theirs = (CheckpointReader(path) for path in (exported / "w4", tmp_path / "in"))
    for name in ours.manifest.layers:
        first, second = ours.load(name), theirs.load(name)
        assert isinstance(first, QuantizedTensor)
        assert isinstance(second, QuantizedTensor)
        assert torch.equal(dequantized(first), dequantized(second))


def test_a_record_beside_weights_that_are_not_quantized_changes_nothing(cli, llama, tmp_path):
    directory = tmp_path / "plain"
    shutil.copytree(llama, directory)
    (directory / "quantize_config.json").write_text("{}")
    load_model(Location(directory))
    assert "isn't quantized: there is nothing to import" in cli("import", directory, "x").said[-1]
    assert "`qtool quantize` makes a checkpoint" in cli("inspect", directory).said[-1]
