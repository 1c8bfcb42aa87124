"""What is refused before anything is imported, read or written: names, paths, places of results."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import torch as safetensors

from qtool.cli.guess import guess_seconds
from qtool.modeling.locate import Location, locate
from qtool.recipe.calibration import CalibrationSection
from tests.cli.conftest import Cli

SLOW = ("torch", "transformers", "lm_eval")
RUN = """
import json, sys
sys.argv = ["qtool", *sys.argv[1:]]
from qtool.cli.app import main
try:
    main()
except SystemExit as stop:
    heavy = [name for name in ("torch", "transformers", "lm_eval") if name in sys.modules]
    print(json.dumps([stop.code, heavy]))
"""


def refusal(*arguments: object) -> tuple[int, list[str], str, float]:
    """Return exit code, heavy imports, what was said, and the seconds of computing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, heavy, done.stderr, spent


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        ("quantize nomodel {out}", []),
        ("eval nomodel", []),
        ("bench nomodel", []),
        ("calibrate nomodel {out}", []),
        ("eval {llama} --backend fast", []),
        ("eval {llama} --tasks mmlu --data-dir {out}", []),
        ("eval {llama} --tasks mmlu,arc_challenge --data-dir {empty}", []),
        ("quantize --method rtm {llama} {out}", ["torch"]),
        ("quantize --method rtn --set weights.options.clip_rato=1 {llama} {out}", ["torch"]),
        ("quantize --method gptq --no-calibration {llama} {out}", ["torch"]),
        ('quantize --set weights.overrides=[{{"match":x,"skip":true}}] {llama} {out}', ["torch"]),
        ('quantize --dry-run --set weights.overrides=[{{"match":x}}] {llama} {out}', ["torch"]),
    ],
)
def test_a_wrong_name_is_refused_before_slow_imports(llama, tmp_path, command, heavy):
    if "--tasks" in command:
        pytest.importorskip("lm_eval")
    (tmp_path / "empty").mkdir()
    places = {"llama": llama, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    code, imported, said, spent = refusal(*command.format(**places).split())
    assert (code, imported) == (1, heavy), said
    assert "Error: " in said
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
