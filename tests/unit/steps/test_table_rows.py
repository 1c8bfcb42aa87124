"""Rows of embedding and head with bits of their own, and tables solved with data: whole runs."""

from dataclasses import replace

import pytest
import torch

from qtool import pipeline
from qtool.base import Env, Progress
from qtool.checkpoint.reader import CheckpointReader
from qtool.choosing.choose_rows import choose_rows, expected_losses
from qtool.data.special_tokens import protected_tokens
from qtool.errors import QtoolError, RecipeError
from qtool.modeling.load import load_model, load_original, load_tokenizer
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.rows import cluster_sizes
from qtool.steps import solve_table, table_statistics
from qtool.steps.draw_calibration import draw_calibration
from qtool.steps.plan import make_plan
from qtool.steps.run import Run
from qtool.steps.solve_table import solve_alone
from qtool.steps.table_statistics import OTHER_WORDS, measure_tables, table_hessian
from tests.families import VOCABULARY
from tests.helpers import QUICK_BCQ, dequantized, file_hashes

COMMON, RARE = 10, 60
"""Words below the first come often in the text, those from the second on never."""


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """Return a text of words whose frequency falls with their number."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.0 if n < 3 or n >= RARE else 1 / n**2 for n in range(VOCABULARY)])
    words = chances.multinomial(900, replacement=True, generator=generator)
    path = tmp_path_factory.mktemp("skewed") / "words.txt"
    path.write_text(" ".join(f"w{word}" for word in words.tolist()), encoding="utf-8")
    return path


def table(rows=None, *, bits=3, **changes):
    options = {**QUICK_BCQ, "scales": "coded"}
    section = {"method": "bcq", "scheme": {"num_bits": bits, "group_size": 32}, "options": options}
    return {**section, **({} if rows is None else {"rows": rows}), **changes}


def recipe(text, **tables):
    sections = {"weights": {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}}, **tables}
    if text is not None:
        sections["calibration"] = {"dataset": str(text), "num_samples": 8, "sequence_length": 64}
    return recipe_from_mapping(sections)


def run_of(directory, chosen):
    source = open_source(Location(directory))
    samples = draw_calibration(
        chosen.calibration, source, load_tokenizer(directory), lengths=None, seed=0
    )
    return Run(source, chosen, make_plan(source, chosen), samples, Env("cpu"))


def bits_of(directory, chosen):
    """Return by table the bits of its rows as they are chosen, a list."""
    plan = choose_rows(run_of(directory, chosen)).plan
    return {layer.role: list(layer.row_bits) for layer in plan.layers if layer.row_bits}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("average", [1.5, 3.0])
def test_rows_share_the_bits_and_are_read_again(tiny, skewed, tmp_path, tied, average):
    rows = {"average_bits": average}
    tables = {"embedding": table(rows)} if tied else {"embedding": table(rows), "head": table(rows)}
    directory, chosen = tiny("llama", tied=tied), recipe(skewed, **tables)
    result = pipeline.quantize(Location(directory), tmp_path / "out", chosen)
    stored = {one.name: one.entry for one in result.layers if one.entry.scheme.rows}
    assert len(stored) == len(tables)
    for entry in stored.values():
        assert sum(bits * count for bits, count in entry.scheme.rows) <= average * VOCABULARY
        assert sum(count for _, count in entry.scheme.rows) == VOCABULARY
    plan = choose_rows(run_of(directory, chosen)).plan
    assert plan.total_bytes == result.weight_bytes
    reader, model = CheckpointReader(tmp_path / "out"), load_model(Location(tmp_path / "out"))
    for name, entry in stored.items():
        loaded = model.model.get_submodule(name).tensor()
        assert loaded.scheme.rows == entry.scheme.rows
        assert reader.manifest.layers[name] == entry
        assert bool(torch.isfinite(dequantized(loaded)).all())
    logits = model.model(torch.arange(3, 40).unsqueeze(0)).logits
    assert logits.shape[-1] == VOCABULARY and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("tied", [True, False])
def test_frequent_tokens_have_more_bits_and_protected_ones_enough(tiny, skewed, tied):
    rows = {"average_bits": 2.5}
    tables = {"embedding": table(rows)} if tied else {"embedding": table(rows), "head": table(rows)}
    directory = tiny("llama", tied=tied)
    chosen = bits_of(directory, recipe(skewed, **tables))
    common, rare = chosen["embedding"][3:COMMON], chosen["embedding"][RARE:]
    if not tied:  # a random model expects all words alike, so that its head needs all alike
        assert sum(common) / len(common) > sum(rare) / len(rare)
    for bits in chosen.values():
        for token in protected_tokens(load_tokenizer(directory)):
            assert bits[token] >= 2


def test_clusters_have_the_sizes_of_the_paper(llama, skewed):
    rows = {"rule": "clusters", "clusters": 3, "ratio": 3, "min_bits": 2}
    (bits,) = bits_of(llama, recipe(skewed, embedding=table(rows))).values()
    assert [bits.count(width) for width in (4, 3, 2)] == cluster_sizes(VOCABULARY, 3, 3)
    assert {bits[token] for token in protected_tokens(load_tokenizer(llama))} == {4}
    plan = make_plan(open_source(Location(llama)), recipe(skewed, embedding=table(rows)))
    planned = next(layer for layer in plan.layers if layer.role == "embedding")
    assert planned.scheme.rows == tuple(
        zip((4, 3, 2), cluster_sizes(VOCABULARY, 3, 3), strict=True)
    )


def test_bounds_hold(llama, skewed):
    rows = {"average_bits": 3.5, "min_bits": 3, "max_bits": 4}
    (bits,) = bits_of(llama, recipe(skewed, head=table(rows))).values()
    assert set(bits) == {3, 4} and sum(bits) == int(3.5 * VOCABULARY)


@pytest.mark.parametrize("tied", [True, False])
def test_table_of_one_width_is_solved_with_data(tiny, skewed, tmp_path, tied):
    where = "embedding" if tied else "head"
    directory, chosen = tiny("llama", tied=tied), recipe(skewed, **{where: table()})
    with_data = pipeline.quantize(Location(directory), tmp_path / "data", chosen).layers[-1]
    pipeline.quantize(Location(directory), tmp_path / "free", recipe(None, **{where: table()}))
    run = run_of(directory, chosen)
    layer = run.plan.layers[-1]
    hessian = table_hessian(run, layer, measure_tables(run, None))
    losses = {}
    for kind in ("data", "free"):
        module = load_model(Location(tmp_path / kind)).model.get_submodule(layer.name)
        error = dequantized(module.tensor()) - run.source.read_weight(layer.name)
        losses[kind] = float(((error @ hessian) * error).sum())
    assert losses["data"] < 0.9 * losses["free"]
    assert "loss" in with_data.metrics


def test_embedding_alone_is_solved_without_data(llama, skewed, tmp_path, monkeypatch):
    monkeypatch.setattr(table_statistics, "load_source", lambda *_: pytest.fail("measured"))
    pipeline.quantize(Location(llama), tmp_path / "data", recipe(skewed, embedding=table()))
    rounded = {"embedding": {"method": "rtn"}, "head": {"method": "rtn"}}
    pipeline.quantize(Location(llama), tmp_path / "rounded", recipe(skewed, **rounded))


@pytest.mark.parametrize("tied", [True, False])
def test_statistics_are_those_of_the_original(tiny, skewed, tied):
    directory = tiny("llama", tied=tied)
    run = run_of(directory, recipe(skewed, embedding=table()))
    found = measure_tables(run, None)
    model, inputs, chances = load_original(directory, "cpu"), [], []
    for sample in run.calibration.samples:
        inputs.append(model.model(sample[None]).last_hidden_state[0].detach())
        chances.append((inputs[-1] @ model.lm_head.weight.T).softmax(-1).detach())
    x, p = torch.cat(inputs), torch.cat(chances)
    assert torch.allclose(found.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    others = OTHER_WORDS / VOCABULARY
    expected = (1 - OTHER_WORDS) * (p * (1 - p)).mean(0) + others
    assert torch.allclose(found.uncertainty, expected, rtol=1e-3)
    counts = torch.bincount(torch.cat(run.calibration.samples), minlength=VOCABULARY)
    expected = (1 - OTHER_WORDS) * (counts / counts.sum() + p.mean(0)) / 2 + others
    assert torch.allclose(found.frequency, expected, atol=1e-6)
    if tied:  # the divergence is half the variance of the change of the logits
        assert 0.4 < found.of_head < 0.6
        assert found.of_embedding > 0 and found.identity > 0


@pytest.mark.parametrize("finished", [16, 1])
def test_resumed_run_gives_the_same_bytes_and_measures_once(
    tiny, skewed, tmp_path, monkeypatch, finished
):
    directory = tiny("llama", tied=True)
    chosen = recipe(skewed, embedding=table({"average_bits": 2.5}))
    total = len(pipeline.quantize(Location(directory), tmp_path / "whole", chosen).layers)
    done = 0

    def stop(event):
        nonlocal done
        done += isinstance(event, Progress) and event.what == "quantize"
        if done == min(finished, total - 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(Location(directory), tmp_path / "out", chosen, emit=stop)
    monkeypatch.setattr(table_statistics, "load_source", lambda *_: pytest.fail("measured again"))
    pipeline.quantize(Location(directory), tmp_path / "out", chosen, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert file_hashes(tmp_path / "out")[name] == file_hashes(tmp_path / "whole")[name]


ROWS = {"average_bits": 3.0}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (table(ROWS, options={}), "Use method: bcq with options: {scales: coded}"),
        (table(ROWS, method="rtn", options={}), "'rtn' doesn't write as it is set"),
        (table(ROWS, scheme={"group_dim": "out_features"}), "groups run along in_features"),
        (table({"average_bits": 1.5, "min_bits": 2}), "average_bits, 1.5, is outside"),
        (table({"average_bits": 5, "max_bits": 4}), "average_bits, 5, is outside"),
        (table({"average_bits": 3, "min_bits": 4, "max_bits": 2}), "above max_bits"),
        (table({}), "average_bits is missing"),
        (table({"rule": "clusters", "average_bits": 2}), "average_bits is for rule loss"),
        (table({"rule": "clusters", "min_bits": 6}), "reach 9 bits; max_bits is 8"),
        (table({"average_bits": 3, "rulee": "loss"}), "rulee"),
        (table({"average_bits": True}), "is a boolean"),
        (table({"average_bits": 9}), "average_bits"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(llama, skewed, section, message):
    with pytest.raises(QtoolError, match=message):
        make_plan(open_source(Location(llama)), recipe(skewed, embedding=section))


def test_rows_without_samples_are_refused(llama):
    with pytest.raises(RecipeError, match="calibration data"):
        make_plan(open_source(Location(llama)), recipe(None, embedding=table(ROWS)))


def test_recipes_without_rows_are_written_as_before(skewed):
    written = recipe(skewed, embedding=table()).model_dump(mode="json")
    assert "rows" not in written["embedding"]
    kept = recipe(skewed, embedding=table(ROWS)).model_dump(mode="json")["embedding"]["rows"]
    assert kept["average_bits"] == 3.0


def test_expected_losses_fall_with_bits_and_add_up_for_both_uses(tiny, skewed):
    """Of a tied table; and by a use alone they are in the ratio of what is measured."""
    run = run_of(tiny("llama", tied=True), recipe(skewed, embedding=table(ROWS)))
    layer, found = run.plan.layers[-1], measure_tables(run, None)
    both = expected_losses(run, layer, found, range(1, 6))
    assert both.shape == (VOCABULARY, 5) and bool((both.diff(dim=1) < 0).all())
    uses = replace(found, of_embedding=0.0), replace(found, of_head=0.0)
    alone = [expected_losses(run, layer, one, range(1, 6)) for one in uses]
    assert torch.allclose(both, alone[0] + alone[1])


def test_tables_are_measured_once_more_when_bits_of_rows_are_known(tiny, skewed):
    """As by a run that goes on after what was measured got lost."""
    chosen = choose_rows(run_of(tiny("llama", tied=True), recipe(skewed, embedding=table(ROWS))))
    assert chosen.plan.layers[-1].row_bits
    found = measure_tables(chosen, None)
    assert found.of_embedding > 0 and found.of_head > 0


def test_class_of_rows_is_solved_as_a_table_of_its_own(llama, skewed, tmp_path):
    """Each class has the bytes that its rows alone get from the method."""
    chosen = recipe(skewed, embedding=table(ROWS | {"max_bits": 4}))
    pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    run = choose_rows(run_of(llama, chosen))
    layer = run.plan.layers[-1]
    weight = run.source.read_weight(layer.name)
    stored = load_model(Location(tmp_path / "out")).model.get_submodule(layer.name).tensor()
    bits = torch.tensor(list(layer.row_bits))
    for width, _ in layer.scheme.rows:
        uniform = replace(layer.scheme, num_bits=width, rows=())
        part = replace(layer, scheme=uniform, row_bits=b"")
        own = solve_alone(part, weight[bits == width], run.env).tensor
        assert torch.equal(dequantized(stored)[bits == width], dequantized(own))


def test_large_table_is_solved_in_parts(llama, skewed, monkeypatch):
    run = run_of(llama, recipe(skewed, head=table()))
    layer, weight = run.plan.layers[-1], run.source.read_weight("lm_head")
    hessian = table_hessian(run, layer, measure_tables(run, None))
    whole = solve_alone(layer, weight, run.env, hessian)
    monkeypatch.setattr(solve_table, "WEIGHTS_AT_ONCE", 40 * weight.shape[1])
    parts = solve_alone(layer, weight, run.env, hessian)
    assert parts.tensor.shape == whole.tensor.shape and parts.tensor.format == whole.tensor.format
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False])
def test_rows_on_a_card_are_nearly_those_on_the_host(tiny, skewed, tied):
    tables = {"embedding": table(ROWS)} if tied else {"embedding": table(ROWS), "head": table(ROWS)}
    directory, chosen = tiny("llama", tied=tied), recipe(skewed, **tables)
    host = run_of(directory, chosen)
    card = replace(host, env=Env("cuda"))
    plans = [choose_rows(run).plan for run in (host, card)]
    for one, other in zip(*(plan.layers for plan in plans), strict=True):
        if one.row_bits:
            bits = [torch.tensor(list(layer.row_bits)).double() for layer in (one, other)]
            assert (bits[0] - bits[1]).abs().mean() < 0.1
