"""What is refused before anything is imported, read or written: names, paths, places of results."""

import json
import re
import resource
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors import torch as safetensors

from qtool.cli.guess import guess_seconds
from qtool.modeling.locate import Location, locate
from qtool.recipe.calibration import CalibrationSection
from tests.cli.conftest import Cli
from tests.helpers import run_python

RUN = """
import contextlib, io, json, sys
from qtool.cli.app import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["qtool", *arguments]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            main()
    except SystemExit as stop:
        heavy = [name for name in ("torch", "transformers", "lm_eval") if name in sys.modules]
        found.append([stop.code, heavy, said.getvalue()])
print(json.dumps(found))
"""
CHEAP = (
    "quantize nomodel {out}",
    "eval nomodel",
    "bench nomodel",
    "calibrate nomodel {out}",
    "eval {llama} --backend fast",
    "eval {llama} --tasks mmlu --data-dir {out}",
    "eval {llama} --tasks mmlu,arc_challenge --data-dir {empty}",
)
BY_TORCH = (
    "quantize --method rtm {llama} {out}",
    "quantize --method rtn --set weights.options.clip_rato=1 {llama} {out}",
    "quantize --method gptq --no-calibration {llama} {out}",
    'quantize --set weights.overrides=[{{"match":x,"skip":true}}] {llama} {out}',
    'quantize --dry-run --set weights.overrides=[{{"match":x}}] {llama} {out}',
)


@pytest.mark.parametrize(("commands", "heavy"), [(CHEAP, []), (BY_TORCH, ["torch"])])
def test_wrong_names_are_refused_before_slow_imports(llama, tmp_path, commands, heavy):
    if find_spec("lm_eval") is None:
        commands = [command for command in commands if "--tasks" not in command]
    (tmp_path / "empty").mkdir()
    places = {"llama": llama, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    arguments = [command.format(**places).split() for command in commands]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(run_python(RUN, json.dumps(arguments)).splitlines()[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command, (code, imported, said) in zip(commands, found, strict=True):
        assert (code, imported) == (1, heavy), f"{command}: {said}"
        assert "Error: " in said, command
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert heavy or spent < 3  # torch alone takes two to three seconds, by how busy the machine is
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["quantize {m} new", "eval {m}", "bench {m}", "calibrate {m} c"]
)
def test_an_empty_configuration_is_said_to_be_empty(cli: Cli, tmp_path, command):
    (tmp_path / "config.json").write_text("{}")
    done = cli(*command.format(m=tmp_path).split())
    assert done.code == 1
    assert "config.json is empty" in done.said[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "", "out"],
        ["quantize", "m", ""],
        ["quantize", "m", "out", "--calibration", ""],
        ["calibrate", "m", ""],
        ["eval", ""],
        ["eval", "m", "--baseline", ""],
        ["eval", "m", "--tasks", "mmlu", "--data-dir="],
        ["eval", "m", "--json", ""],
        ["bench", ""],
        ["inspect", ""],
    ],
)
def test_an_empty_value_is_a_usage_error(cli: Cli, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.code == 2
    assert re.search(r"(MODEL|_DIR|--\S+) is empty\. Give", done.err)
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["config.json", "quantization_report.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["eval {}", "bench {}", "quantize {} {}/../new", "doctor"])
def test_a_report_never_replaces_a_part_of_a_checkpoint(cli, checkpoint, tmp_path, name, command):
    place = tmp_path / "there"
    shutil.copytree(checkpoint, place)
    (place / name).touch()
    before = contents(place)
    done = cli(*command.format(place, place).split(), "--json", place / name)
    assert done.code == 1
    assert "belongs to the model" in done.said[-1]
    assert contents(place) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_report_never_replaces_a_part_of_a_source(cli: Cli, llama, tmp_path, name):
    place = tmp_path / "there"
    shutil.copytree(llama, place)
    before = contents(place)
    done = cli("doctor", "--json", place / name)
    assert done.code == 1
    assert contents(place) == before


def test_a_report_never_replaces_what_is_no_report(cli: Cli, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("weights: {method: rtn}\n")
    done = cli("recipes", "--json", recipe)
    assert done.code == 1
    assert "isn't the result of an earlier run" in done.said[-1]
    assert recipe.read_text() == "weights: {method: rtn}\n"


def test_a_report_replaces_a_report_also_beside_a_checkpoint(cli: Cli, checkpoint, tmp_path):
    place = tmp_path / "there"
    shutil.copytree(checkpoint, place)
    for target in (tmp_path / "doctor.json", place / "doctor.json"):
        for _ in range(2):
            assert cli("doctor", "--json", target).code == 0
        assert json.loads(target.read_text())["installed"]


@pytest.mark.parametrize("command", ["quantize {m} new", "eval {m}", "calibrate {m} c"])
def test_two_names_for_one_tensor_are_refused_everywhere(cli: Cli, llama, tmp_path, command):
    place = tmp_path / "twice"
    shutil.copytree(llama, place)
    stored = safetensors.load_file(place / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name.removeprefix("model.")] = stored[name] + 1
    safetensors.save_file(stored, place / "model.safetensors", {"format": "pt"})
    done = cli(*command.format(m=place).split())
    assert done.code == 1
    assert f"the model reads both as {name}" in done.said[-1]


def test_two_names_for_one_tensor_are_refused_in_a_baseline(cli: Cli, llama, checkpoint, tmp_path):
    place = tmp_path / "twice"
    shutil.copytree(llama, place)
    stored = safetensors.load_file(place / "model.safetensors")
    stored["norm.weight"] = stored["model.norm.weight"] + 1
    safetensors.save_file(stored, place / "model.safetensors", {"format": "pt"})
    done = cli("bench", checkpoint, "--baseline", place)
    assert done.code == 1
    assert "the model reads both as model.norm.weight" in done.said[-1]


def test_a_guess_grows_with_model_and_samples(tmp_path):
    file = tmp_path / "m.gguf"
    guesses: list[float] = []
    for num_bytes, samples in ((10**6, 2), (10**8, 2), (10**8, 64)):
        with file.open("wb") as opened:
            opened.truncate(num_bytes)
        section = CalibrationSection(num_samples=samples)
        guesses.append(guess_seconds(Location(file), section, "cpu") or 0)
    assert guesses == sorted(set(guesses))
    assert guess_seconds(locate("owner/on-the-hub"), CalibrationSection(), "cpu") is None
