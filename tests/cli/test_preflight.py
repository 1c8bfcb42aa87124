"""`--dry-run=measure`: what a run would take, without one."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from qtool.walk.filled_block import Block
from tests.cli.conftest import Cli

QUICK = ("--set", 'weights.options={"rounds": 1, "iterations": 1, "polish_rounds": 0}')


def options(text: Path) -> list[str]:
    return [
        *("--method", "bcq", "--bits", "3", "--group-size", "32", *QUICK),
        *("--set", f'calibration={{"dataset": "{text}", "num_samples": 6, "sequence_length": 24}}'),
    ]


def phases(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in report["phases"]}


def test_every_phase_is_predicted_and_nothing_is_written(cli: Cli, llama, text_file, tmp_path):
    out = tmp_path / "out"
    command = ("quantize", *options(text_file), "--dry-run=measure", llama, out)
    done = cli(*command, "--json", "-")
    assert done.code == 0, done.err
    found = phases(json.loads(done.out))
    names = "open, draw calibration, read files, capture, solve blocks, write, check"
    assert list(found) == names.split(", ")
    assert all(phase["seconds"] > 0 for phase in found.values())
    assert all(phase["memory_bytes"] > 50e6 for phase in found.values())
    assert found["solve blocks"]["how"] == "1 of 2 blocks measured"
    assert not list(tmp_path.iterdir())
    table = cli(*command)
    assert table.code == 0
    assert "Preflight (nothing was written)" in table.out
    assert "solve blocks" in table.out
    assert "left" in table.out


def test_tuning_tables_and_unlike_blocks_are_phases_of_it(cli: Cli, llama, text_file):
    sections = [
        *("--set", "tuning.blocks.steps=40"),
        *("--set", "tuning.end_to_end.steps=50", "--set", "tuning.end_to_end.batch_size=2"),
        *("--set", "embedding.method=rtn", "--set", "head.method=rtn"),
        *("--set", "embedding.scheme.group_size=32", "--set", "head.scheme.group_size=32"),
        *("--set", 'weights.overrides=[{"match": "*.1.mlp.*", "scheme": {"num_bits": 2}}]'),
    ]
    command = ("quantize", *options(text_file), *sections, "--dry-run=measure", llama, "out")
    done = cli(*command, "--json", "-")
    assert done.code == 0, done.err
    found = phases(json.loads(done.out))
    assert found["solve blocks"]["how"] == "2 of 2 blocks measured"
    assert found["tune blocks"]["how"] == "12 of 40 steps measured"
    assert found["tune end to end"]["how"] == "8 of 50 steps measured"
    assert found["tune end to end"]["seconds"] > 0
    assert found["solve tables"]["how"] == "measured, whole"


def test_without_data_there_is_no_walk(cli: Cli, llama):
    command = ("quantize", "--method", "rtn", "--group-size", "32", "--no-calibration")
    done = cli(*command, "--dry-run=measure", llama, "out", "--json", "-")
    assert done.code == 0, done.err
    assert list(phases(json.loads(done.out))) == ["open", "read files", "solve blocks", "write"]


def test_what_will_not_fit_is_an_error_after_the_table(
    cli: Cli, llama, text_file, tmp_path, monkeypatch
):
    from qtool.steps.usage import MachineRoom

    module = importlib.import_module("qtool.pipeline.preflight")
    monkeypatch.setattr(module, "machine_room", lambda *_: MachineRoom(10**6, 0, 10**12))
    done = cli("quantize", *options(text_file), "--dry-run=measure", llama, tmp_path / "out")
    assert done.code == 1
    assert "Preflight" in done.out
    assert "'solve blocks' needs" in done.err
    assert "1 MB" in done.err
    assert "calibration.num_samples" in done.err


def test_memory_that_is_full_in_the_part_is_answered_or_named(
    cli: Cli, llama, text_file, monkeypatch
):
    output = Block.output

    def limited(self: Block, hidden: Any, call: Any) -> Any:
        if len(hidden) > 1:
            raise MemoryError
        return output(self, hidden, call)

    command = ("quantize", *options(text_file), "--dry-run=measure", llama, "out")
    with monkeypatch.context() as patch:
        patch.setattr(Block, "output", limited)
        done = cli(*command)
    assert done.code == 0, done.err
    assert "batches of samples are run in" in " ".join(done.err.split())

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Block, "output", full)
    done = cli(*command)
    assert done.code == 1
    assert "'solve blocks' won't fit: The memory of this machine is full" in done.err


@pytest.mark.gpu
def test_on_a_card_its_memory_is_predicted_too(cli: Cli, llama, text_file):
    tuned = ("--set", "tuning.blocks.steps=40")
    command = ("quantize", *options(text_file), *tuned, "--dry-run=measure", llama, "out")
    done = cli(*command, "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    found = phases(report)
    for name in ("solve blocks", "tune blocks"):
        assert 0 < found[name]["card_bytes"] < report["room"]["card_bytes"], name
        assert found[name]["margins"]["card"] > 0


@pytest.mark.parametrize("word", ["more", "", "PLAN"])
def test_other_words_are_refused(cli: Cli, llama, word):
    done = cli("quantize", "--method", "rtn", f"--dry-run={word}", llama, "out")
    assert done.code == 2
    assert "measure" in done.err or "empty" in done.err


def test_a_sweep_is_not_measured(cli: Cli, llama):
    sweep = ("--sweep", "average_bits=3", "--dry-run=measure")
    done = cli("quantize", *sweep, llama, "out")
    assert done.code == 1
    assert "--sweep and --dry-run exclude each other" in done.err


def test_run_predicts_what_quantizing_takes(cli: Cli, llama, text_file, tmp_path):
    recipe = tmp_path / "mine.yaml"
    calibration = f"{{dataset: {text_file}, num_samples: 6, sequence_length: 24}}"
    weights = "{method: rtn, scheme: {num_bits: 4, group_size: 32}}"
    recipe.write_text(f"version: 1\ncalibration: {calibration}\nweights: {weights}\n")
    done = cli("run", recipe, llama, tmp_path / "out", "--dry-run=measure", "--json", "-")
    assert done.code == 0, done.err
    assert "solve blocks" in phases(json.loads(done.out))
    assert "check" not in phases(json.loads(done.out))
    assert list(tmp_path.iterdir()) == [recipe]


def test_run_predicts_what_a_cluster_would_take(cli: Cli, llama, text_file, tmp_path):
    recipe = tmp_path / "mine.yaml"
    calibration = f"{{dataset: {text_file}, num_samples: 6, sequence_length: 24}}"
    weights = "{method: rtn, scheme: {num_bits: 4, group_size: 32}}"
    recipe.write_text(f"version: 1\ncalibration: {calibration}\nweights: {weights}\n")
    command = ("run", recipe, llama, tmp_path / "out", "--dry-run=cluster", "--nodes", "3")
    done = cli(*command, "--workers", "6", "--node-memory", "64", "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    found = phases(report)
    assert found["measure"]["seconds"] > 0
    assert found["measure"]["network_bytes"] > 0
    assert report["cluster"]["memory_bytes"] == 64e9
    assert report["node_bytes"] >= 2 * report["worker_bytes"]
    assert list(tmp_path.iterdir()) == [recipe]
    small = cli(*command, "--node-memory", "0.01")
    assert small.code == 1
    assert "memory of a node" in small.err


def test_a_cluster_is_only_of_a_run_on_paper(cli: Cli, llama):
    done = cli("run", "ci/smoke", llama, "out", "--nodes", "3", "--network", "1")
    assert done.code == 1
    assert "--nodes and --network need --dry-run=cluster" in done.err
