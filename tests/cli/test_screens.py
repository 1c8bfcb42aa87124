"""What tables and last lines say: all of a model on one screen, and what to do next."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoint.reader import CheckpointReader
from qtool.cli.tables.alike import alike
from qtool.recipe.names import built_in, in_folders
from tests.cli.conftest import Cli


@dataclass(frozen=True)
class Layer:
    name: str
    bits: int


LAYERS = st.builds(
    lambda block, expert, name, bits: Layer(f"m.{block}.{name}[{expert}]", bits),
    *(st.integers(0, 40), st.integers(0, 9), st.sampled_from(["up", "w2"]), st.integers(2, 3)),
)


@given(st.lists(LAYERS, unique=True))
def test_each_layer_is_in_one_row_with_its_likes(layers):
    rows = alike(layers, lambda one: one.name, lambda one: one.bits)
    assert sorted(repr(one) for _, same in rows for one in same) == sorted(map(repr, layers))
    assert all(len({one.bits for one in same}) == 1 for _, same in rows)
    assert len(rows) <= 4
    assert len({name for name, _ in rows}) <= len(rows)


@pytest.mark.parametrize(
    ("blocks", "shown"),
    [([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([5, 4], "4-5"), (range(0, 20, 2), "0,2,4,6,...")],
)
def test_names_of_alike_layers_are_one_with_stretches(blocks, shown):
    layers = [Layer(f"model.layers.{block}.fc1", 4) for block in blocks]
    ((name, same),) = alike(layers, lambda one: one.name, lambda one: one.bits)
    assert name == f"model.layers.{shown}.fc1"
    assert same == layers


def test_a_dry_run_shows_alike_layers_once_and_all_in_json(cli: Cli, llama, tmp_path):
    command = ["quantize", "--method", "rtn", "--dry-run", llama, tmp_path / "out"]
    mixed = ["--set", 'weights.overrides=[{"match": "*.1.mlp.up_proj", "scheme": {"num_bits": 2}}]']
    rows = [line for line in cli(*command, *mixed).out.splitlines() if "model.layers" in line]
    assert len(rows) == 8  # seven linears, one of them in two kinds
    assert sum("layers.0-1." in row for row in rows) == 6
    assert len(json.loads(cli(*command, "--json", "-").out)["layers"]) == 14


def test_what_to_do_next_can_be_pasted(cli: Cli, llama, tmp_path):
    out_dir = tmp_path / "o ü"
    done = cli("quantize", "--method", "rtn", llama, out_dir)
    lines = done.out.split("Next:\n")[1].splitlines()
    program, command, *rest = shlex.split(lines[0])
    assert (program, command, rest) == ("qtool", "eval", [str(out_dir), "--baseline", str(llama)])
    assert cli("inspect", out_dir).code == 0
    assert (
        "Next" not in cli("quantize", "--method", "rtn", llama, tmp_path / "b", "--json", "-").out
    )


def test_the_home_directory_is_found_at_the_end_too(cli: Cli, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = cli("quantize", "--method", "rtn", llama, "~/out")
    assert done.code == 0, done.err
    assert "qtool bench '~/out'" in done.out


def test_a_folder_that_takes_no_files_isn_t_said_to_be_missing(cli: Cli):
    done = cli("doctor", "--json", "/proc/result.json")
    assert "Can't write /proc/result.json: No such file" in done.said[-1]


def test_sparse_planes_say_what_they_take(cli: Cli, llama, tmp_path):
    done = cli("quantize", "--method", "sparse_bcq", "--bits", "2", llama, tmp_path / "out")
    option = "--set weights.scheme.symmetric=true"
    assert option in done.said[-1]
    assert "WeightScheme(" not in done.said[-1]
    again = cli(
        "quantize",
        "--method",
        "sparse_bcq",
        "--bits",
        "2",
        "--dry-run",
        *option.split(),
        llama,
        "x",
    )
    assert again.code == 0, again.err


def test_all_recipes_are_listed(cli: Cli):
    printed, dumped = cli("recipes").out, json.loads(cli("recipes", "--json", "-").out)
    assert set(dumped) == {*built_in(), *in_folders()}
    assert all(f" {name} " in printed for name in dumped)


def test_reading_all_tensors_tells_how_far_it_is(checkpoint):
    told: list[Any] = []
    count = CheckpointReader(checkpoint).verify(told.append)
    assert [(event.done, event.total) for event in told] == [(n, count) for n in range(count)]
