"""One checkpoint, whoever did the work: one process, several, killed ones, nodes of a cluster."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from qtool.base import Notice, Progress
from qtool.engines import EngineOptions, Workers
from qtool.errors import EngineError, RecipeError
from qtool.modeling.locate import Location
from qtool.pipeline.quantize import quantize
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.schema import Recipe
from tests import families
from tests.helpers import file_hashes
from tests.ray_cluster import two_nodes

TWO = EngineOptions("local", Workers(count=2))


def recipe(method: str = "gptq", **calibration: Any) -> Recipe:
    return recipe_from_mapping(
        {
            "weights": {"method": method, "scheme": {"num_bits": 3, "group_size": 16}},
            "calibration": {
                "dataset": "wikitext2-valid",
                "num_samples": 6,
                "sequence_length": 48,
                "holdout": 0.34,
                "part_rows": 1024,  # as an engine divides them
                **calibration,
            },
        },
        [],
    )


def weights(directory: Path) -> Mapping[str, str]:
    return {
        name: digest
        for name, digest in file_hashes(directory).items()
        if name.endswith((".safetensors", "config.json"))
    }


@pytest.fixture(scope="module")
def alone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives what one process makes of a recipe, made once."""
    made: dict[str, Mapping[str, str]] = {}

    def make(wanted: Recipe, model: Location | None = None) -> Mapping[str, str]:
        key = f"{model}{wanted.model_dump_json()}"
        if key not in made:
            out = tmp_path_factory.mktemp("alone") / "out"
            quantize(model or Location(llama), out, wanted)
            made[key] = weights(out)
        return made[key]

    return make


@pytest.mark.parametrize(
    ("method", "prefix"),
    [
        ("gptq", "linears"),
        ("gptq", "original"),
        ("bcq", "linears"),
        pytest.param("gptq", "block", marks=pytest.mark.slow),
        pytest.param("bcq", "block", marks=pytest.mark.slow),
        pytest.param("bcq", "original", marks=pytest.mark.slow),
    ],
)
def test_two_workers_write_what_one_process_writes(alone, llama, tmp_path, method, prefix):
    wanted = recipe(method, prefix=prefix, chunks=8)
    quantize(Location(llama), tmp_path / "two", wanted, engine=TWO)
    assert weights(tmp_path / "two") == alone(wanted)


def test_an_engine_divides_samples_and_rows_unless_the_recipe_says(alone, llama, tmp_path):
    one = EngineOptions("local", Workers(count=1))
    quantize(Location(llama), tmp_path / "one", recipe(part_rows=None), engine=one)
    assert weights(tmp_path / "one") == alone(recipe(chunks=8))


@pytest.mark.parametrize("method", ["gptq", pytest.param("bcq", marks=pytest.mark.slow)])
def test_rows_are_solved_apart_wherever_that_is(alone, llama, tmp_path, method):
    wanted = recipe(method, chunks=8, part_rows=16)
    quantize(Location(llama), tmp_path / "two", wanted, engine=TWO)
    assert weights(tmp_path / "two") == alone(wanted)
    assert weights(tmp_path / "two") != alone(recipe(method, chunks=8))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Location:
    directory = tmp_path_factory.mktemp("experts")
    families.build("qwen2_moe", num_experts_per_tok=2).save_pretrained(directory)
    families.save_tokenizer(directory)
    return Location(directory)


@pytest.mark.parametrize("prefix", ["linears", pytest.param("original", marks=pytest.mark.slow)])
def test_experts_are_tasks_of_their_own(alone, experts, tmp_path, prefix):
    wanted, told = recipe(prefix=prefix, chunks=2, num_samples=3), list[str]()

    def tell(event: Progress | Notice) -> None:
        if isinstance(event, Notice):
            told.append(event.message)

    quantize(experts, tmp_path / "two", wanted, engine=TWO, emit=tell)
    assert weights(tmp_path / "two") == alone(wanted, experts)
    assert any("experts got fewer calibration tokens" in message for message in told)


def test_a_run_that_stopped_between_layers_of_experts_goes_on(
    alone, experts, tmp_path, monkeypatch
):
    from qtool.steps import solve

    wanted, before = recipe(chunks=2, num_samples=3), solve._announce
    one = EngineOptions("local", Workers(count=1))

    def stop(run: Any, result: Any, done: int) -> None:
        before(run, result, done)
        if result.name.endswith("0.mlp.experts.down_proj[1]"):
            raise EngineError("Stopped.")

    monkeypatch.setattr(solve, "_announce", stop)
    with pytest.raises(EngineError, match="Stopped"):
        quantize(experts, tmp_path / "out", wanted, engine=one)
    monkeypatch.undo()
    quantize(experts, tmp_path / "out", wanted, engine=one, resume=True)
    assert weights(tmp_path / "out") == alone(wanted, experts)


def test_layers_without_data_are_shared_too(llama, tmp_path):
    wanted = recipe_from_mapping({"weights": {"method": "rtn"}}, [])
    quantize(Location(llama), tmp_path / "one", wanted)
    quantize(Location(llama), tmp_path / "two", wanted, engine=TWO)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def workers_of(pid: int) -> list[int]:
    """Return the processes that the fork server of a process has started."""

    def children(parent: int) -> list[int]:
        path = Path(f"/proc/{parent}/task/{parent}/children")
        return [int(child) for child in path.read_text().split()] if path.exists() else []

    return [worker for server in children(pid) for worker in children(server)]


def test_killed_workers_change_nothing(alone, llama, tmp_path):
    wanted, killed = recipe("bcq", chunks=8), list[int]()

    def kill(event: Progress | Notice) -> None:
        """End one of the workers, and both after the third layer."""
        if isinstance(event, Progress) and event.what == "quantize" and event.done in (1, 3, 6, 9):
            for pid in workers_of(os.getpid())[: 2 if event.done == 3 else 1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    options = EngineOptions("local", Workers(count=2, tries=10))
    quantize(Location(llama), tmp_path / "killed", wanted, engine=options, emit=kill)
    assert len(killed) >= 3
    assert weights(tmp_path / "killed") == alone(wanted)


def test_a_worker_that_stands_still_for_a_while_changes_nothing(alone, llama, tmp_path):
    wanted, stopped = recipe(chunks=8), list[int]()

    def stop(event: Progress | Notice) -> None:
        """Let one of the workers stand still for a second."""
        if isinstance(event, Progress) and event.what == "quantize" and event.done == 3:
            stopped.append(workers_of(os.getpid())[0])
            os.kill(stopped[0], signal.SIGSTOP)
            Timer(1, os.kill, (stopped[0], signal.SIGCONT)).start()

    quantize(Location(llama), tmp_path / "slow", wanted, engine=TWO, emit=stop)
    assert stopped
    assert weights(tmp_path / "slow") == alone(wanted)


def test_a_run_whose_workers_always_end_goes_on_with_other_workers(
    alone, llama, tmp_path, monkeypatch
):
    from qtool.steps import shared_walk

    wanted, before = recipe(chunks=8), shared_walk.SharedWalk._measure

    def stop(self: Any, index: int, linear: str) -> Any:
        if index == 1:
            raise EngineError("The worker ended 5 times.")
        return before(self, index, linear)

    monkeypatch.setattr(shared_walk.SharedWalk, "_measure", stop)
    with pytest.raises(EngineError, match="7 finished layers are kept"):
        quantize(Location(llama), tmp_path / "out", wanted, engine=TWO)
    monkeypatch.undo()
    one = EngineOptions("local", Workers(count=1))  # this process: none is begun
    quantize(Location(llama), tmp_path / "out", wanted, engine=one, resume=True)
    assert weights(tmp_path / "out") == alone(wanted)


def test_what_cannot_be_shared_is_refused_before_anything_is_written(llama, tmp_path):
    wanted = recipe(output_groups=2, part_rows=None)
    with pytest.raises(RecipeError, match=r"calibration\.output_groups can't be shared"):
        quantize(Location(llama), tmp_path / "out", wanted, engine=TWO)
    assert not list(tmp_path.iterdir())


def test_local_workers_have_no_address(llama, tmp_path):
    options = EngineOptions("local", Workers(address="auto"))
    with pytest.raises(EngineError, match="--engine ray"):
        quantize(Location(llama), tmp_path / "out", recipe(), engine=options)


def test_two_nodes_of_a_cluster_write_the_same(alone, llama, tmp_path):
    asked = [
        recipe(method, prefix=prefix, chunks=2)
        for method in ("gptq", "bcq")
        for prefix in ("linears", "original")
    ]
    with two_nodes() as address:
        options = EngineOptions("ray", Workers(count=2, address=address))
        for number, wanted in enumerate(asked):
            quantize(Location(llama), tmp_path / str(number), wanted, engine=options)
    for number, wanted in enumerate(asked):
        assert weights(tmp_path / str(number)) == alone(wanted)
