"""Memory that is full in a run: smaller parts, the same result, a sentence in the report."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from qtool import pipeline
from qtool.base import Env, Fallback, QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.parts import Parts
from qtool.errors import BackendError
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.schema import Recipe
from qtool.scheme import WeightScheme
from qtool.steps import solve_rows as rows
from qtool.steps.plan import load_method
from qtool.training import descent
from qtool.walk.filled_block import Block
from tests.helpers import QUICK_BCQ, dequantized, normal, problem, warnings_in

ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
REPORT = "quantization_report.json"


def recipe(dataset: object, **tuning: Any) -> Recipe:
    section = {"dataset": str(dataset), "num_samples": 12, "sequence_length": 32}
    scheme = {"num_bits": 2, "group_size": 32}
    weights = {"method": "bcq", "scheme": scheme, "options": QUICK_BCQ}
    return recipe_from_mapping({"calibration": section, "weights": weights, "tuning": tuning})


def small_batches(patch: Any) -> None:
    """Leave blocks room for two samples at a time."""
    output = Block.output

    def limited(self: Block, hidden: Any, call: Any) -> Any:
        if len(hidden) > 2:
            raise RuntimeError(ON_CPU)
        return output(self, hidden, call)

    patch.setattr(Block, "output", limited)


def few_rows(patch: Any) -> None:
    """Leave a solver room for half of a weight's rows."""

    def limited(name: str) -> Any:
        method = load_method(name)

        def solved(given: Any, options: Any) -> Any:
            if len(given.weight) > 32:
                raise MemoryError
            return method.solve(given, options)

        return replace(method, solve=solved)

    patch.setattr("qtool.steps.solve_calibrated.load_method", limited)


def weights_of(directory: Any) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(directory)
    return {
        name: dequantized(cast("QuantizedTensor", reader.load(name)))
        for name in reader.manifest.layers
    }


@pytest.mark.parametrize(
    ("limit", "words"),
    [(small_batches, "batches of samples are run in"), (few_rows, "64 x 64 are solved in 2 parts")],
)
def test_a_run_in_parts_has_the_same_result_and_says_so(
    llama, text_file, tmp_path, monkeypatch, limit: Callable[[Any], None], words
):
    wanted = recipe(text_file)
    pipeline.quantize(Location(llama), tmp_path / "whole", wanted)
    events: list[Any] = []
    with monkeypatch.context() as patch:
        limit(patch)
        result = pipeline.quantize(Location(llama), tmp_path / "parts", wanted, emit=events.append)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for name, weight in whole.items():
        assert torch.allclose(parts[name], weight, atol=1e-3), name
    told = [event.message for event in events if isinstance(event, Fallback)]
    assert words in " ".join(told)
    assert set(told) <= set(warnings_in(events))
    report = json.loads((tmp_path / "parts" / REPORT).read_text())
    assert report["fallbacks"] == list(dict.fromkeys(told)) == list(result.fallbacks)
    assert "fallbacks" not in json.loads((tmp_path / "whole" / REPORT).read_text())


def test_a_resumed_run_reports_what_was_done_in_parts_before(
    llama, text_file, tmp_path, monkeypatch
):
    wanted, layers = recipe(text_file), list[Any]()

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(event: Any) -> None:
        layers.extend([event] if getattr(event, "what", "") == "quantize" else [])
        if len(layers) == 9:
            raise Stopped

    with monkeypatch.context() as patch:
        small_batches(patch)
        with pytest.raises(Stopped):
            pipeline.quantize(Location(llama), tmp_path / "out", wanted, emit=stop)
    result = pipeline.quantize(Location(llama), tmp_path / "out", wanted, resume=True)
    assert "batches of samples are run in" in " ".join(result.fallbacks)
    again = pipeline.quantize(Location(llama), tmp_path / "out", wanted, resume=True)
    assert again.fallbacks == result.fallbacks


def test_without_smaller_parts_it_is_the_sentence_that_it_was(
    llama, text_file, tmp_path, monkeypatch
):
    def full(*_: Any) -> Any:
        raise RuntimeError(ON_CPU)

    monkeypatch.setattr(Block, "output", full)
    with pytest.raises(BackendError, match="The memory of this machine is full"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe(text_file))


@pytest.mark.parametrize("tuning", ["blocks", "end_to_end"])
def test_tuning_accumulates_the_gradients_of_parts(llama, text_file, tmp_path, monkeypatch, tuning):
    section = {"steps": 4, "learning_rate": 1e-2}
    if tuning == "end_to_end":
        section |= {"batch_size": 4, "sequence_length": 32}
    wanted = recipe(text_file, **{tuning: section})
    pipeline.quantize(Location(llama), tmp_path / "whole", wanted)
    gradients = descent.Stepper._gradients

    def limited(self: Any, count: int) -> Any:
        if count < 2:
            gradients(self, count)  # what it left behind mustn't matter
            raise MemoryError
        return gradients(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(descent.Stepper, "_gradients", limited)
        result = pipeline.quantize(Location(llama), tmp_path / "parts", wanted)
    assert "steps of tuning are taken in 2 parts" in " ".join(result.fallbacks)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for name, weight in whole.items():
        same = torch.isclose(parts[name], weight, atol=2e-3)
        assert float(same.float().mean()) > 0.99, name


@pytest.mark.parametrize("group_dim", ["in_features", "out_features"])
def test_rows_that_share_a_group_stay_together(group_dim):
    scheme = WeightScheme(num_bits=3, group_size=16, group_dim=group_dim)
    whole = problem(normal(72, 32), scheme)
    method = load_method("rtn")
    sizes: list[int] = []

    def limited(given: Any, options: Any) -> Any:
        sizes.append(len(given.weight))
        if len(given.weight) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return method.solve(given, options)

    env = Env("cpu", parts=Parts(lambda _: None))
    options = method.options()
    found = rows.solve_rows(replace(method, solve=limited), whole, options, env)
    wanted = method.solve(whole, options)
    assert torch.equal(dequantized(found.tensor), dequantized(wanted.tensor))
    if group_dim == "out_features":
        assert {size % 16 for size in sizes} <= {0, 72 % 16}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # it is: nothing ran before the error
@pytest.mark.parametrize("tuning", ["blocks", "end_to_end"])
def test_a_card_without_room_for_a_graph_takes_steps_in_parts(
    llama, text_file, tmp_path, monkeypatch, tuning
):
    section = {"steps": 12, "learning_rate": 1e-2}
    if tuning == "end_to_end":
        section |= {"batch_size": 4, "sequence_length": 32}
    gradients = descent.Stepper._gradients

    def limited(self: Any, count: int) -> Any:
        if self._done > descent.EAGER_STEPS and count < 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradients(self, count)

    monkeypatch.setattr(descent.Stepper, "_gradients", limited)
    result = pipeline.quantize(
        Location(llama), tmp_path / "o", recipe(text_file, **{tuning: section})
    )
    assert "steps of tuning are taken in 2 parts" in " ".join(result.fallbacks)
