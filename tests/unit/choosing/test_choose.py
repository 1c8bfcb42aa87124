"""Choosing bits for a tiny model: budgets, prices that are kept, what is refused."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.base import Env
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.sizes import sizes_of
from qtool.choosing import candidates
from qtool.choosing import choose as step
from qtool.choosing.prices import PIECE_TOKENS, pieces
from qtool.data.calibration import CalibrationSet
from qtool.errors import MethodError, RecipeError, SchemeError
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.schema import Recipe, TableSection
from qtool.steps import method_choice
from qtool.steps.plan import load_method, make_plan
from qtool.steps.run import Run
from tests.helpers import recipe

SHORT = {"num_samples": 12, "sequence_length": 32}


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))


def choosing(average: float, text_file=None, *, weights=None, tables=(), **keys: Any) -> Recipe:
    """Return a recipe that chooses; `tables` are the sections beside `weights` that it has."""
    dataset = {"dataset": str(text_file)} if text_file else {}
    sections: dict[str, Any] = {table: {} for table in tables}
    chosen = recipe(
        calibration={**dataset, **SHORT},
        choosing={"average_bits": average, **keys},
        **sections,
    )
    return chosen if weights is None else recipe_with(chosen, weights)


def recipe_with(chosen: Recipe, overrides: list[dict[str, Any]]) -> Recipe:
    weights = chosen.weights.model_validate({**chosen.weights.model_dump(), "overrides": overrides})
    return chosen.model_copy(update={"weights": weights})


def explain(model, chosen: Recipe) -> step.Allocation:
    found = pipeline.explain(Location(model), chosen)
    assert found is not None
    return found


def bits_of(plan) -> dict[str, int]:
    return {layer.name: layer.scheme.num_bits for layer in plan.layers}


def test_a_recipe_that_leaves_nothing_open_chooses_nothing(llama):
    assert pipeline.explain(Location(llama), recipe()) is None


@pytest.mark.parametrize("average", [3.0, 3.7, 4.2])
def test_the_budget_is_used_and_kept(llama, text_file, average):
    found = explain(llama, choosing(average, text_file))
    in_blocks = list(found.plan.in_blocks)
    bits = 8 * sum(layer.num_bytes for layer in in_blocks) / sum(prod(e.shape) for e in in_blocks)
    assert average - 0.2 < bits <= average
    assert found.average_bits == pytest.approx(bits)
    assert found.divergence == pytest.approx(sum(row.price for row in found.layers))
    assert len(set(bits_of(found.plan).values())) > 1


def test_linears_that_share_an_input_share_a_choice(llama, text_file):
    bits = bits_of(explain(llama, choosing(3.6, text_file)).plan)
    for block in range(2):
        attention = {bits[f"model.layers.{block}.self_attn.{name}_proj"] for name in "qkv"}
        mlp = {bits[f"model.layers.{block}.mlp.{name}_proj"] for name in ("gate", "up")}
        assert len(attention) == len(mlp) == 1


def test_more_bits_cost_less_and_skipping_costs_nothing(llama, text_file):
    choices = [2, 3, 4, "skip"]
    tight = explain(llama, choosing(2.7, text_file, choices=choices))
    found = explain(llama, choosing(16, text_file, choices=choices))
    assert tight.divergence > 0
    assert {row.price for row in found.layers} == {0.0}
    assert list(found.plan.layers) == []
    assert "model.layers.0.mlp.up_proj.weight" in found.plan.kept


def test_a_choice_may_change_the_group_size(llama, text_file):
    choices = [{"num_bits": 3, "group_size": 16}, {"num_bits": 3, "group_size": 64}]
    found = explain(llama, choosing(4.0, text_file, choices=choices))
    assert {layer.scheme.group_size for layer in found.plan.layers} == {16, 64}


def test_overrides_win(llama, text_file):
    overrides = [
        {"match": "*.0.*.down_proj", "scheme": {"num_bits": 8}},
        {"match": "*.1.*.down_proj", "skip": True},
        {"match": "*.o_proj", "options": {"clip_ratio": 0.9}},
    ]
    found = explain(llama, choosing(7.0, text_file, weights=overrides))
    bits = bits_of(found.plan)
    open_names = {row.name for row in found.layers}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert "model.layers.1.mlp.down_proj" not in bits
    assert not {name for name in open_names if name.endswith("down_proj")}
    assert {name for name in open_names if name.endswith("o_proj")}
    assert found.average_bits <= 7.0  # what is skipped counts as it is stored


@pytest.mark.parametrize("tied", [False, True])
def test_strict_bits_are_those_on_disk(tiny, text_file, tmp_path, tied):
    model = tiny("llama", tied=tied)
    tables = ("embedding",) if tied else ("embedding", "head")
    chosen = choosing(4.6, text_file, tables=tables, counts="strict")
    result = pipeline.quantize(Location(model), tmp_path / "out", chosen)
    sizes = sizes_of(CheckpointReader(tmp_path / "out"))
    strict = 8 * sum(each.num_bytes for each in sizes.kinds) / sizes.num_weights
    assert 4.4 < strict <= 4.6
    assert result.choosing["average_bits"] == pytest.approx(strict)
    names = {row["name"] for row in result.choosing["layers"]}
    assert {"model.embed_tokens", "lm_head"} & names == (
        {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    )


def test_rows_of_a_table_that_are_asked_for_stay_under_a_strict_budget(tiny, text_file, tmp_path):
    rows = {
        "method": "bcq",
        "options": {"scales": "coded", "rounds": 1},
        "rows": {"average_bits": 3},
    }
    plain = choosing(4.6, text_file, counts="strict", tables=("embedding",))
    table = TableSection.model_validate({**rows, "scheme": {"group_size": 32}})
    chosen = plain.model_copy(update={"embedding": table})
    model = tiny("llama", tied=True)
    result = pipeline.quantize(Location(model), tmp_path / "out", chosen)
    scheme = CheckpointReader(tmp_path / "out").manifest.layers["model.embed_tokens"].scheme
    assert sum(bits * count for bits, count in scheme.rows) <= 3 * sum(n for _, n in scheme.rows)
    assert "model.embed_tokens" not in {row["name"] for row in result.choosing["layers"]}
    assert result.choosing["average_bits"] <= 4.6
    open_names = {each.name for each in candidates.open_layers(*planned(model, chosen))}
    assert open_names and "model.embed_tokens" not in open_names


def planned(model, chosen: Recipe):
    source = open_source(Location(model))
    return source, chosen, make_plan(source, chosen)


def test_tables_keep_their_bits_where_only_blocks_count(llama, text_file):
    found = explain(llama, choosing(3.6, text_file, tables=("embedding", "head")))
    bits = bits_of(found.plan)
    assert (bits["model.embed_tokens"], bits["lm_head"]) == (8, 8)


def test_the_checkpoint_has_what_was_chosen_and_the_report_says_so(llama, text_file, tmp_path):
    chosen = choosing(3.6, text_file)
    found = explain(llama, chosen)
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    entries = CheckpointReader(tmp_path / "out").manifest.layers
    assert {name: entry.scheme.num_bits for name, entry in entries.items()} == bits_of(found.plan)
    assert result.average_bits == pytest.approx(found.average_bits)
    assert result.weight_bytes == found.plan.total_bytes
    again = pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    assert again.choosing == result.choosing
    assert result.choosing["divergence"] == found.divergence


@pytest.mark.gpu
def test_prices_on_a_card_are_those_of_a_cpu(llama, text_file):
    from qtool.modeling.device import use_device

    chosen, found = choosing(3.6, text_file), []
    for device in ("cpu", "cuda"):
        with use_device(device):
            found.append(explain(llama, chosen))
    here, there = found
    assert here.seconds != there.seconds  # what one device measured isn't the other's
    assert there.divergence == pytest.approx(here.divergence, rel=0.5)
    assert there.average_bits == pytest.approx(here.average_bits, abs=0.1)


@pytest.mark.parametrize("family", ["ctrl", "gemma2", "mpt"])
def test_families_with_ways_of_their_own_have_prices(family, text_file, tmp_path):
    from tests import families, zoo

    zoo.build(family, tied=True).save_pretrained(tmp_path / family)
    families.save_tokenizer(tmp_path / family)
    keys = {"counts": "strict", "choices": [3, 4]}
    found = explain(tmp_path / family, choosing(7.0, text_file, tables=("embedding",), **keys))
    assert all(0 < row.price < 1 for row in found.layers)


def refuse(*_arguments: object) -> None:
    raise MethodError("again")


def test_prices_are_measured_once_for_all_budgets(llama, text_file, monkeypatch):
    first = explain(llama, choosing(3.6, text_file))
    monkeypatch.setattr(step, "measure_prices", refuse)
    assert explain(llama, choosing(3.6, text_file)) == first
    assert explain(llama, choosing(4.2, text_file)).divergence < first.divergence
    with pytest.raises(MethodError, match="again"):
        explain(llama, choosing(3.6, text_file, choices=[2, 4]))


def test_a_resumed_run_has_the_prices_of_the_first(llama, text_file, tmp_path, monkeypatch):
    chosen = choosing(3.6, text_file)
    whole = pipeline.quantize(Location(llama), tmp_path / "whole", chosen)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as stopping:
        stopping.setitem(pipeline.quantize.__globals__, "solve", refuse)
        with pytest.raises(MethodError, match="again"):
            pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "third"))
    monkeypatch.setattr(step, "measure_prices", refuse)
    resumed = pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    assert resumed.choosing["layers"] == whole.choosing["layers"]


@pytest.mark.parametrize(
    ("keys", "sections", "message"),
    [
        ({}, {}, r"average_bits is 2\.5, and the smallest choices take 2\.563 .*Ask for 2\.563"),
        ({"counts": "strict"}, {}, r"the whole model.* section 'embedding' \(and 'head'\)"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_nearest(llama, keys, sections, message):
    with pytest.raises(RecipeError, match=message):
        pipeline.explain(Location(llama), choosing(2.5, **keys, **sections))


def test_the_nearest_budget_is_possible(llama, text_file):
    found = explain(llama, choosing(2.563, text_file))
    assert set(bits_of(found.plan).values()) == {2}
    assert all(row.margin.loss is None for row in found.layers)


def test_bits_that_a_method_lacks_are_refused(llama, monkeypatch):
    fewer = replace(load_method("rtn"), num_bits=range(2, 9))
    monkeypatch.setattr(method_choice, "load_method", lambda _name: fewer)
    chosen = choosing(4.0, choices=[1, 4])
    source = open_source(Location(llama))
    with pytest.raises(SchemeError, match=r"choosing names 1 bits; 'rtn' takes 2 to 8"):
        candidates.open_layers(source, chosen, make_plan(source, chosen))


def test_without_data_nothing_is_chosen(llama):
    chosen = choosing(4.0).model_copy(update={"calibration": None})
    with pytest.raises(RecipeError, match="choosing needs calibration data"):
        pipeline.explain(Location(llama), chosen)


def test_pieces_are_short_and_from_everywhere():
    samples = tuple(torch.arange(n * 1000, n * 1000 + 3 * PIECE_TOKENS + 5) for n in range(8))
    found = pieces(CalibrationSet((*samples, torch.arange(7)), {}), 4 * PIECE_TOKENS)
    assert {len(piece) for piece in found} <= {PIECE_TOKENS, 7}
    assert len({int(piece[0]) // 1000 for piece in found}) == len(found) == 4
    everything = pieces(CalibrationSet(samples, {}), 10**9)
    assert len(everything) == 3 * len(samples)


def test_a_run_that_chooses_tells_of_it(llama, text_file):
    events: list[Any] = []
    source = open_source(Location(llama))
    chosen = choosing(3.6, text_file)
    samples = pipeline.quantize.__globals__["open_samples"](source, chosen, None, events.append)
    env = Env(device="cpu", emit=events.append)
    found = step.choose(Run(source, chosen, make_plan(source, chosen), samples, env))
    assert found is not None
    assert {"solving choices", "weighing choices by gradients"} <= {e.what for e in events}
