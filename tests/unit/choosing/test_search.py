"""Q-Rater on a tiny model: where it starts, what it never does, what it keeps, what it refuses."""

import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool import pipeline
from qtool.base import Env
from qtool.checkpoint.reader import CheckpointReader
from qtool.choosing.search import q_rater
from qtool.choosing.search.q_rater import clearly_less
from qtool.choosing.search.stage import Said, Stage, cut_evenly
from qtool.choosing.search.trials import Judge, try_settings
from qtool.choosing.search.units import Knob, SearchUnit, search_units
from qtool.data.calibration import CalibrationSet
from qtool.errors import DataError, MethodError, MissingExtraError, RecipeError
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.pipeline.quantize import open_samples
from qtool.recipe.activations import ActivationsSection
from qtool.recipe.schema import Recipe
from qtool.recipe.search import SearchSection
from qtool.steps.plan import make_plan
from qtool.steps.run import Run
from qtool.training.divergence import divergence
from tests.helpers import QUICK_BCQ, file_hashes, normal, recipe

SHORT = {"num_samples": 12, "sequence_length": 32, "holdout": 0.4, "input_error": 0}
FEW = {"clip_ratios": [1.0, 0.8], "roundings": [-0.1, 0.1], "samples": 4}


def searching(text_file, solver: str = "rtn", options: Any = None, **keys: Any) -> Recipe:
    chosen = recipe(
        solver,
        3,
        calibration={"dataset": str(text_file), **SHORT},
        search={**FEW, **({} if "method" in keys else {"keep": 2}), **keys},
    )
    if not options:
        return chosen
    weights = chosen.weights.model_copy(update={"options": options})
    return chosen.model_copy(update={"weights": weights})


def planned(model, chosen: Recipe) -> tuple[SearchUnit, ...]:
    source = open_source(Location(model))
    assert chosen.search is not None
    return search_units(source, make_plan(source, chosen), chosen.search)


def quantized(model, out_dir, chosen: Recipe, **keys: Any) -> pipeline.QuantizeResult:
    return pipeline.quantize(Location(model), out_dir, chosen, **keys)


def lines_of(out_dir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "search.jsonl").read_text().splitlines()]


def test_linears_that_share_an_input_share_numbers(llama, text_file):
    units = planned(llama, searching(text_file))
    assert [unit.name.removeprefix("model.layers.") for unit in units[:4]] == [
        *("0.self_attn.q_proj", "0.self_attn.o_proj", "0.mlp.gate_proj", "0.mlp.down_proj"),
    ]
    assert [len(unit.layers) for unit in units[:4]] == [3, 1, 2, 1]
    assert [knob.key for knob in units[0].knobs] == ["clip_ratio", "rounding"]
    plans = units[0].under((0.8, None))
    assert {plan.options.clip_ratio for plan in plans} == {0.8}
    assert {plan.options.rounding for plan in plans} == {0.0}
    assert units[0].under(units[0].start) == units[0].layers


def test_numbers_of_a_block_are_searched_together_by_tpe(llama, text_file):
    units = planned(llama, searching(text_file, method="tpe"))
    assert [unit.name for unit in units] == ["model.layers.0", "model.layers.1"]
    assert len(units[0].knobs) == 8


@pytest.mark.parametrize(
    ("method", "options", "keys"),
    [
        ("rtn", {}, ["clip_ratio", "rounding"]),
        ("gptq", {"clip_candidates": 3, "polish_rounds": 0}, ["clip_ratio"]),
        ("bcq", QUICK_BCQ, ["clip_ratio"]),
    ],
)
def test_a_search_ends_no_worse_than_it_began(llama, text_file, tmp_path, method, options, keys):
    chosen = searching(text_file, method, options)
    assert [knob.key for knob in planned(llama, chosen)[0].knobs] == keys
    result = quantized(llama, tmp_path / "out", chosen)
    found = result.search
    assert 0 < found["end"] <= found["start"]
    assert (found["end"] < found["start"]) == bool(found["found"])
    lines = lines_of(tmp_path / "out")
    assert found["block_evaluations"] == len(lines)
    assert found["evaluations"] == sum(line["loss"] is not None for line in lines)
    assert {line["of"] for line in lines if line["taken"]} == {line["of"] for line in lines}


def test_what_is_found_is_what_is_solved(llama, text_file, tmp_path, monkeypatch):
    losses = iter([torch.ones(4), torch.zeros(4)])
    monkeypatch.setattr(Stage, "final_losses", lambda *_: next(losses))
    monkeypatch.setattr(q_rater, "clearly_less", lambda *_losses: True)
    chosen = searching(text_file)
    result = quantized(llama, tmp_path / "searched", chosen)
    found = result.search["found"]
    assert found
    overrides = [
        {"match": layer.name, "options": options}
        for unit in planned(llama, chosen)
        for layer in unit.layers
        if (
            options := {
                knob.key: found[key]
                for knob in unit.knobs
                if (key := f"{knob.layers[0]}.{knob.key}") in found
            }
        )
    ]
    weights = chosen.weights.model_dump() | {"overrides": overrides}
    by_hand = recipe("rtn", 3, calibration=chosen.calibration).model_copy(
        update={"weights": type(chosen.weights).model_validate(weights)}
    )
    quantized(llama, tmp_path / "by hand", by_hand)
    searched, plain = (
        CheckpointReader(tmp_path / "searched"),
        CheckpointReader(tmp_path / "by hand"),
    )
    assert searched.manifest.digests == plain.manifest.digests


def test_a_search_that_nothing_convinces_leaves_the_bytes_alone(
    llama, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(q_rater, "clearly_less", lambda *_losses: False)
    result = quantized(llama, tmp_path / "searched", searching(text_file))
    assert result.search["found"] == {}
    assert result.search["end"] == result.search["start"]
    plain = recipe("rtn", 3, calibration={"dataset": str(text_file), **SHORT})
    quantized(llama, tmp_path / "plain", plain)
    searched, without = (
        CheckpointReader(tmp_path / "searched"),
        CheckpointReader(tmp_path / "plain"),
    )
    assert searched.manifest.digests == without.manifest.digests


def test_all_is_undone_if_all_in_all_it_is_worse(llama, text_file, tmp_path, monkeypatch):
    """Each number may help where it was found, and all of them together may not."""
    monkeypatch.setattr(q_rater, "clearly_less", lambda *_losses: True)
    losses = iter([torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.5])])
    monkeypatch.setattr(Stage, "final_losses", lambda *_: next(losses))
    result = quantized(llama, tmp_path / "out", searching(text_file))
    assert result.search["found"] == {}
    assert (result.search["start"], result.search["end"]) == (1.0, 1.0)


class StoppedError(MethodError):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_that_goes_on_finds_what_it_would_have_found(
    llama, text_file, tmp_path, monkeypatch, method
):
    options = {"clip_candidates": 3, "polish_rounds": 0} if method == "gptq" else {}
    chosen = searching(text_file, method, options)
    whole = quantized(llama, tmp_path / "whole", chosen)
    searched, count = q_rater._searched, iter(range(100))

    def stopping(*arguments: Any) -> Any:
        if next(count) == 5:  # in the second block
            raise StoppedError("stopped")
        return searched(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(q_rater, "_searched", stopping)
        with pytest.raises(StoppedError):
            quantized(llama, tmp_path / "out", chosen)
    again: list[str] = []

    def counting(*arguments: Any) -> Any:
        again.append(arguments[3].name)
        return searched(*arguments)

    monkeypatch.setattr(q_rater, "_searched", counting)
    resumed = quantized(llama, tmp_path / "out", chosen, resume=True)
    assert len(again) == 3
    assert {**resumed.search, "seconds": 0} == {**whole.search, "seconds": 0}
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")
    weights = [file_hashes(tmp_path / name)["model.safetensors"] for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_layers_behind_a_unit_are_the_originals(llama, text_file):
    """With all of a model's layers at 8 bits in the first unit alone, little is lost."""
    chosen = searching(text_file)
    source = open_source(Location(llama))
    samples = open_samples(source, chosen, None, lambda _event: None)
    run = Run(source, chosen, make_plan(source, chosen), samples, Env("cpu"))
    assert chosen.search is not None
    first, *others = planned(llama, chosen)
    stage = Stage(run, chosen.search)
    early = stage.losses(first, first.start, held_out=False)
    assert stage.error(first, first.start) > 0
    for unit in (first, *others):
        stage.freeze(unit, unit.start)
    late = stage.losses(others[-1], others[-1].start, held_out=False)
    assert early.shape == late.shape == (4,)
    assert float(late.mean()) > float(early.mean()) > 0
    whole = stage.final_losses([first, *others], [unit.start for unit in (first, *others)])
    held_out = stage.losses(others[-1], others[-1].start, held_out=True)
    torch.testing.assert_close(whole, held_out)


def test_the_loss_is_the_divergence():
    wanted, logits = normal(2, 5, 11), normal(2, 5, 11, seed=1)
    found = Said.of(wanted).divergences(logits)
    each = [float(divergence(*pair)) for pair in zip(logits, wanted, strict=True)]
    assert found.tolist() == pytest.approx(each, rel=1e-5)
    assert Said.of(wanted).divergences(wanted).abs().max() < 1e-6


UNIT = SearchUnit(
    "unit",
    0,
    (),
    (Knob(("a",), "clip_ratio", False, (0.9, 0.8)), Knob(("a",), "rounding", False, (-0.1, 0.1))),
)


def test_the_grid_spares_losses_where_the_block_errs_and_changes_one_number_after_the_other():
    errors = {None: 3.0, 0.9: 1.0, 0.8: 2.0, -0.1: 0.5, 0.1: 0.0}
    looked: list[Any] = []

    def loss(setting: Any) -> float:
        looked.append(setting)
        return {None: 0.0, 0.9: -1.0, 0.8: -9.0, -0.1: 1.0, 0.1: -2.0}[setting[0]] + (
            {None: 0.0, -0.1: 1.0, 0.1: -2.0}[setting[1]]
        )

    judge = Judge(lambda setting: sum(errors[value] for value in setting), loss)
    try_settings(UNIT, judge, SearchSection(keep=1), seed=0)
    assert looked == [(None, None), (0.9, None), (0.9, 0.1)]  # 0.8 is best, but its block errs more
    assert judge.best() == (0.9, 0.1)
    trials = judge.trials()
    assert [trial.setting for trial in trials if trial.loss is None] == [(0.8, None), (0.9, -0.1)]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(1, 3))
def test_the_grid_never_takes_what_loses_more_than_the_start(losses, keep):
    values = dict(zip([None, 0.9, 0.8], losses, strict=True))
    judge = Judge(lambda setting: -values[setting[0]], lambda setting: values[setting[0]])
    try_settings(UNIT, judge, SearchSection(keep=keep), seed=0)
    assert judge.losses[judge.best()] <= judge.losses[UNIT.start]
    assert len(judge.losses) <= len(judge.errors) == 5


def test_tpe_starts_with_the_recipe_stays_in_the_lists_and_is_repeatable():
    pytest.importorskip("optuna")
    section = SearchSection(method="tpe", trials=20)

    def measure(setting: Any) -> float:
        return sum(abs((value or 0) - 0.8) for value in setting)

    judges = [Judge(measure, measure) for _ in range(2)]
    for judge in judges:
        try_settings(UNIT, judge, section, seed=3)
    first, second = (judge.trials() for judge in judges)
    assert first == second
    assert first[0].setting == UNIT.start
    assert {trial.setting[0] for trial in first} <= {None, 0.9, 0.8}
    assert judges[0].best() == (0.8, 0.1)


def test_tpe_searches_a_model(llama, text_file, tmp_path):
    pytest.importorskip("optuna")
    result = quantized(llama, tmp_path / "out", searching(text_file, method="tpe", trials=8))
    assert result.search["end"] <= result.search["start"]


def test_without_optuna_tpe_is_refused_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    judge = Judge(lambda _setting: 0.0, lambda _setting: 0.0)
    with pytest.raises(MissingExtraError, match=r"search\.method tpe needs the 'search' extra"):
        try_settings(UNIT, judge, SearchSection(method="tpe"), seed=0)


@pytest.mark.parametrize(
    ("after", "clearly"),
    [([0.9, 0.9, 0.9], True), ([1.0, 1.0, 1.0], False), ([0.1, 1.2, 1.2], False)],
)
def test_a_gain_counts_beyond_its_standard_error(after, clearly):
    before = torch.ones(3, dtype=torch.float64)
    assert clearly_less(before, torch.tensor(after, dtype=torch.float64)) is clearly


def test_samples_are_cut_evenly_and_two_are_needed():
    samples = CalibrationSet((torch.arange(10), torch.arange(10, 20), torch.arange(20, 23)), {})
    pieces = cut_evenly(samples, SearchSection(samples=2, sequence_length=5))
    assert [piece.tolist() for piece in pieces] == [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]]
    with pytest.raises(DataError, match=r"at least 2 held-out samples of 10 tokens.*is 1"):
        cut_evenly(CalibrationSet((torch.arange(10),), {}), SearchSection())


def test_nothing_to_search_is_refused(llama, text_file):
    nothing = searching(text_file, clip_ratios=[1.0], roundings=[])
    with pytest.raises(RecipeError, match="search has nothing to search"):
        planned(llama, nothing)


def test_without_data_nothing_is_searched(llama):
    with pytest.raises(RecipeError, match="search needs calibration data to measure losses on"):
        pipeline.plan(Location(llama), recipe(search={}))


def test_a_recipe_without_search_says_nothing_of_it():
    assert "search" not in recipe().model_dump()
    assert "search" in recipe(search={}, calibration={}).model_dump()


@pytest.mark.parametrize("keys", [{"clip_ratios": [0.5, 0.5]}, {"roundings": [0.3]}, {"keep": 0}])
def test_impossible_keys_are_refused(keys):
    with pytest.raises(RecipeError, match="search"):
        recipe(search=keys)


def test_numbers_of_inputs_are_searched_where_they_are_quantized_per_token(
    llama, text_file, tmp_path, monkeypatch
):
    losses = iter([torch.ones(4), torch.zeros(4)])
    monkeypatch.setattr(Stage, "final_losses", lambda *_: next(losses))
    monkeypatch.setattr(q_rater, "clearly_less", lambda *_losses: True)
    lists: dict[str, Any] = {
        "clip_ratios": [],
        "roundings": [],
        "activation_clip_ratios": [0.7],
    }
    asked = searching(text_file, **lists, activation_roundings=[-0.1, 0.1])
    activations = ActivationsSection(num_bits=4)
    chosen = asked.model_copy(update={"activations": activations})
    keys = {knob.key for unit in planned(llama, chosen) for knob in unit.knobs if knob.of_inputs}
    assert keys == {"clip_ratio", "rounding"}
    result = quantized(llama, tmp_path / "out", chosen)
    entries = CheckpointReader(tmp_path / "out").manifest.layers
    found = {
        f"{name}.activation_{key}": getattr(entry.activation, key)
        for name, entry in entries.items()
        for key in ("clip_ratio", "rounding")
    }
    assert result.search["found"]
    assert result.search["found"].items() <= found.items()


def static(text_file, **keys: Any) -> Recipe:
    """Return a search of nothing but the steps of inputs per tensor."""
    asked = searching(text_file, clip_ratios=[], roundings=[], **keys)
    activations = ActivationsSection(num_bits=5, granularity="tensor")
    return asked.model_copy(update={"activations": activations})


def test_static_steps_are_searched_as_shares_of_the_range(llama, text_file, tmp_path, monkeypatch):
    losses = iter([torch.ones(4), torch.zeros(4)])
    monkeypatch.setattr(Stage, "final_losses", lambda *_: next(losses))
    monkeypatch.setattr(q_rater, "clearly_less", lambda *_losses: True)
    chosen = static(text_file, activation_clip_ratios=[0.8, 0.6], activation_roundings=[0.1])
    found = quantized(llama, tmp_path / "out", chosen).search["found"]
    quantized(llama, tmp_path / "plain", chosen.model_copy(update={"search": None}))
    searched, plain = (
        CheckpointReader(tmp_path / name).manifest.layers for name in ("out", "plain")
    )
    assert any(key.endswith("clip_ratio") for key in found)
    for name, entry in searched.items():
        first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        first = first.replace("up_proj", "gate_proj")
        assert entry.activation is not None
        assert entry.activation.clip_ratio == 1
        assert entry.activation.rounding == found.get(f"{first}.activation_rounding", 0)
    first = "model.layers.0.self_attn.q_proj"  # what it sees doesn't depend on what is found
    scales = [layers[first].activation.scale for layers in (searched, plain)]  # type: ignore[union-attr]
    assert scales[0] == found.get(f"{first}.activation_clip_ratio", 1) * scales[1]


def test_static_steps_that_nothing_convinces_of_stay(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(q_rater, "clearly_less", lambda *_losses: False)
    chosen = static(text_file, activation_clip_ratios=[0.5])
    assert quantized(llama, tmp_path / "out", chosen).search["found"] == {}
    quantized(llama, tmp_path / "plain", chosen.model_copy(update={"search": None}))
    searched, plain = (CheckpointReader(tmp_path / name).manifest for name in ("out", "plain"))
    assert searched.layers == plain.layers
    assert searched.digests == plain.digests


def test_a_stage_quantizes_by_steps_of_what_it_sees(llama, text_file):
    chosen = static(text_file, activation_clip_ratios=[0.01, 0.9])
    source = open_source(Location(llama))
    samples = open_samples(source, chosen, None, lambda _event: None)
    run = Run(source, chosen, make_plan(source, chosen), samples, Env("cpu"))
    assert chosen.search is not None
    unit = planned(llama, chosen)[0]
    stage = Stage(run, chosen.search)
    start, cut, less = (stage.error(unit, (value, *unit.start[1:])) for value in (None, 0.01, 0.9))
    assert cut > 2 * start > 0
    assert less != start


@pytest.mark.gpu
def test_a_card_searches_as_a_cpu_does(llama, text_file, tmp_path):
    from qtool.modeling.device import use_device

    ends = []
    for device in ("cpu", "cuda"):
        with use_device(device):
            found = quantized(llama, tmp_path / device, searching(text_file)).search
        assert 0 < found["end"] <= found["start"]
        ends.append(found["start"])
    assert ends[0] == pytest.approx(ends[1], rel=0.1)
