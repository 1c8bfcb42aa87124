"""Tuning in a run: what is resumed, what stays, what a checkpoint has of it."""

from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.base import Notice, Progress, QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import QtoolError, RecipeError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.recipe.calibration import CalibrationSection, SourceSection
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.schema import Recipe
from qtool.recipe.tuning import EndToEndTuning
from qtool.steps import tune_blocks, tune_model
from qtool.training import divergence, end_to_end
from tests.helpers import QUICK_BCQ, dequantized, file_hashes, warnings_in

BLOCKS = {"steps": 4, "learning_rate": 1e-2, "code_rate": 0.05}
MODEL = {"steps": 6, "batch_size": 2, "sequence_length": 32, "learning_rate": 1e-2}


def recipe(dataset: object, *, method: str = "bcq", **tuning: Any) -> Recipe:
    section = {"dataset": str(dataset), "num_samples": 12, "sequence_length": 32}
    options = QUICK_BCQ if method == "bcq" else {"polish_rounds": 1}
    scheme = {"num_bits": 2, "group_size": 32}
    weights = {"method": method, "scheme": scheme, "options": options}
    return recipe_from_mapping({"calibration": section, "weights": weights, "tuning": tuning})


class Stopped(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module", params=["bcq", "gptq"])
def unbroken(request, llama, text_file, tmp_path_factory):
    """Return a recipe of a method and a checkpoint that one run has made; read only."""
    wanted = recipe(text_file, method=request.param, blocks=BLOCKS, end_to_end=MODEL)
    out_dir = tmp_path_factory.mktemp("unbroken") / "whole"
    pipeline.quantize(Location(llama), out_dir, wanted)
    return wanted, out_dir


@pytest.mark.parametrize("where", ["second block", "model", "layers"])
def test_resumed_run_gives_the_bytes_of_an_unbroken_one(
    llama, unbroken, tmp_path, monkeypatch, where
):
    wanted, whole = unbroken
    calls: list[str] = []
    module, name = {
        "second block": (tune_blocks, "tune_block"),
        "model": (tune_model, "tune_end_to_end"),
        "layers": (tune_model, "stored_parts"),
    }[where]
    original = getattr(module, name)

    def stop(*arguments: Any) -> Any:
        calls.append(name)
        if where != "second block" or len(calls) == 2:
            raise Stopped
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module, name, stop)
        pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    pipeline.quantize(Location(llama), tmp_path / "out", wanted, resume=True)
    first, second = file_hashes(whole), file_hashes(tmp_path / "out")
    for file in ("model.safetensors", "config.json", "tuning.jsonl"):
        assert first[file] == second[file]


def test_a_rate_is_found_once_and_said(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_model, "TRIED_STEPS", 4)
    wanted = recipe(text_file, end_to_end={**MODEL, "learning_rate": "auto", "recompute": True})
    events: list[Any] = []
    pipeline.quantize(Location(llama), tmp_path / "whole", wanted, emit=events.append)
    told = [event.what for event in events if isinstance(event, Progress)]
    assert any(what.startswith("learning rate 0.0") for what in told)
    with monkeypatch.context() as patch, pytest.raises(Stopped):

        def stop(*_: Any) -> Any:
            raise Stopped

        patch.setattr(tune_model, "tune_end_to_end", stop)
        pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    monkeypatch.setattr(tune_model, "best_rate", lambda *_: pytest.fail("tried again"))
    pipeline.quantize(Location(llama), tmp_path / "out", wanted, resume=True)
    first, second = file_hashes(tmp_path / "whole"), file_hashes(tmp_path / "out")
    assert first["model.safetensors"] == second["model.safetensors"]


@pytest.mark.parametrize(("codes", "when"), [({"code_rate": 0.02}, 25), ({"code_share": 0.01}, 70)])
def test_tuning_that_is_stopped_goes_on_where_it_was_looked_at_last(
    llama, text_file, tmp_path, monkeypatch, codes, when
):
    wanted = recipe(text_file, end_to_end={**MODEL, "steps": 20, **codes})
    pipeline.quantize(Location(llama), tmp_path / "whole", wanted)
    seen: list[int] = []
    measured = divergence.divergence

    def count(*arguments: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == when:
            raise Stopped
        return measured(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(end_to_end, "divergence", count)
        pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    events: list[Any] = []
    pipeline.quantize(Location(llama), tmp_path / "out", wanted, resume=True, emit=events.append)
    steps = [e.done for e in events if isinstance(e, Progress) and e.what == "tune end to end"]
    assert 2 < steps[0] <= 20
    first, second = file_hashes(tmp_path / "whole"), file_hashes(tmp_path / "out")
    for file in ("model.safetensors", "config.json", "tuning.jsonl"):
        assert first[file] == second[file]


def test_norms_learn_with_the_model_and_only_if_they_may(llama, text_file, tmp_path):
    norm = "model.layers.0.input_layernorm.weight"
    kept = load_model(Location(llama)).model.get_parameter(norm)
    for norms in (True, False):
        out = tmp_path / str(norms)
        wanted = recipe(text_file, end_to_end={**MODEL, "norms": norms})
        pipeline.quantize(Location(llama), out, wanted)
        found = load_model(Location(out)).model.get_parameter(norm)
        assert torch.equal(found, kept) is not norms


def test_memory_is_said_before_the_first_step(llama, text_file, tmp_path):
    events: list[Any] = []
    wanted = recipe(text_file, end_to_end=MODEL)
    pipeline.quantize(Location(llama), tmp_path / "out", wanted, emit=events.append)
    told = [event.what for event in events if isinstance(event, Progress)]
    (said,) = [what for what in told if what.startswith("tuning 6 steps, about ")]
    assert said.endswith(" of memory")
    assert told.index(said) < told.index("tune end to end")


def test_planes_stay_end_to_end_and_scales_move(llama, text_file, tmp_path):
    pipeline.quantize(Location(llama), tmp_path / "before", recipe(text_file))
    pipeline.quantize(Location(llama), tmp_path / "after", recipe(text_file, end_to_end=MODEL))
    before, after = (CheckpointReader(tmp_path / name) for name in ("before", "after"))
    moved = 0
    for layer in before.manifest.layers:
        first, second = before.load(layer), after.load(layer)
        assert isinstance(first, QuantizedTensor)
        assert isinstance(second, QuantizedTensor)
        assert torch.equal(first.parts["bit_planes"], second.parts["bit_planes"])
        moved += not torch.equal(first.parts["plane_scales"], second.parts["plane_scales"])
    assert moved > 0


def test_a_rate_that_diverges_is_said_and_ruins_nothing(llama, text_file, tmp_path):
    events: list[Any] = []
    pipeline.quantize(Location(llama), tmp_path / "before", recipe(text_file))
    wanted = recipe(text_file, end_to_end={**MODEL, "learning_rate": 1.0, "steps": 40})
    pipeline.quantize(Location(llama), tmp_path / "after", wanted, emit=events.append)
    (message,) = [text for text in warnings_in(events) if "gained nothing" in text]
    assert "Lower tuning.end_to_end.learning_rate, 1 now" in message
    assert any(isinstance(event, Notice) for event in events)
    hashes = [file_hashes(tmp_path / name)["model.safetensors"] for name in ("before", "after")]
    assert hashes[0] == hashes[1]


def test_quantized_tables_are_what_the_student_has(llama, text_file, tmp_path, monkeypatch):
    wanted = recipe(text_file, end_to_end=MODEL)
    tables = {"embedding": {"scheme": {"num_bits": 4, "group_size": 32}}, "head": {}}
    wanted = recipe_from_mapping({**wanted.model_dump(mode="json"), **tables})
    students = []
    tune = end_to_end.tune_end_to_end

    def note(pair: Any, *others: Any) -> Any:
        students.append(pair.student)
        return tune(pair, *others)

    monkeypatch.setattr(tune_model, "tune_end_to_end", note)
    pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    reader = CheckpointReader(tmp_path / "out")
    for name in ("model.embed_tokens", "lm_head"):
        stored = reader.load(name)
        assert isinstance(stored, QuantizedTensor)
        weight = students[0].get_submodule(name).weight
        torch.testing.assert_close(weight, dequantized(stored).to(weight.dtype))


def test_tuning_without_samples_is_refused_before_anything_is_read(llama, tmp_path):
    wanted = recipe_from_mapping({"weights": {"method": "rtn"}, "tuning": {"blocks": {}}})
    with pytest.raises(RecipeError, match="tuning needs calibration data"):
        pipeline.quantize(Location(llama), tmp_path / "out", wanted)


@pytest.mark.parametrize(
    "tuning", [{"blocks": {"steps": 0}}, {"end_to_end": {"learning_rate": 0}}, {"blox": {}}]
)
def test_keys_that_are_wrong_are_refused(text_file, tuning):
    with pytest.raises(QtoolError, match="tuning"):
        recipe(text_file, **tuning)


@pytest.mark.parametrize(
    ("device", "share", "expected"),
    [("cpu", "auto", None), ("cuda", "auto", 0.3), ("cpu", 0.5, 0.5), ("cuda", 0.0, None)],
)
def test_the_original_writes_a_share_of_what_is_learned_from(device, share, expected):
    section = EndToEndTuning(self_written=share)
    asked = CalibrationSection()
    sources = tune_model.with_own_texts(asked, section, device).sources
    own = [one.share for one in sources if one.dataset == "model"]
    assert own == ([] if expected is None else [expected])
    assert sum(one.share for one in sources) == pytest.approx(1)


def test_a_mixture_that_has_what_the_original_writes_gets_no_more_of_it():
    shares = {"model": 0.2, "prose": 0.8}
    mixture = tuple(SourceSection(dataset=name, share=share) for name, share in shares.items())
    asked = CalibrationSection(mixture=mixture)
    assert tune_model.with_own_texts(asked, EndToEndTuning(self_written=0.5), "cuda") == asked
