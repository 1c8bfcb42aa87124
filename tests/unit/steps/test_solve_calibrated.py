"""Quantizing with calibration data: the walk through the blocks, from outside."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool import pipeline
from qtool.base import Progress, QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import QtoolError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.walk import sums, walk
from qtool.walk.statistics import FEW_TOKENS, raised
from tests.helpers import QUICK_BCQ, dequantized, file_hashes, warnings_in

SCHEME = {"num_bits": 3, "group_size": 32}
QUICK: dict[str, dict[str, object]] = {
    "gptq": {"polish_rounds": 1},
    "bcq": dict(QUICK_BCQ),
}
METHODS = [*QUICK]


def recipe(method, dataset, **calibration):
    section = {"dataset": str(dataset), "num_samples": 6, "sequence_length": 64, **calibration}
    weights = {"method": method, "scheme": SCHEME, "options": QUICK[method]}
    return recipe_from_mapping({"calibration": section, "weights": weights})


@torch.inference_mode()
def output_error(original, directory) -> float:
    """Return the relative error of the logits on tokens that no sample holds."""
    tokens = torch.arange(3, 67).unsqueeze(0)
    expected, got = (
        load_model(Location(where)).model(tokens).logits for where in (original, directory)
    )
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_same_samples_give_the_same_bytes_and_are_recorded(llama, text_file, tmp_path, method):
    for name in ("a", "b"):
        pipeline.quantize(Location(llama), tmp_path / name, recipe(method, text_file))
    first, second = file_hashes(tmp_path / "a"), file_hashes(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert first[name] == second[name]
    assert CheckpointReader(tmp_path / "a").manifest.calibration


@pytest.mark.parametrize("rows", [None, 24])
def test_errors_of_weights_are_those_of_the_weights_not_of_shifted_ones(
    llama, text_file, tmp_path, rows
):
    chosen = recipe("gptq", text_file, input_error=1, part_rows=rows)
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    original, reader = load_file(llama / "model.safetensors"), CheckpointReader(tmp_path / "out")
    for layer in result.layers:
        found, weight = reader.load(layer.name), original[f"{layer.name}.weight"].double()
        assert isinstance(found, QuantizedTensor)
        wrong = dequantized(found, torch.float64) - weight
        expected = float(wrong.square().sum() / weight.square().sum())
        assert layer.metrics["nmse"] == pytest.approx(expected, rel=1e-4), layer.name


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_resumes_to_the_same_bytes(llama, text_file, tmp_path, method):
    chosen = recipe(method, text_file)
    pipeline.quantize(Location(llama), tmp_path / "whole", chosen)
    interrupted(llama, tmp_path / "out", chosen)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert file_hashes(tmp_path / "out")[name] == file_hashes(tmp_path / "whole")[name]


def interrupted(llama, out_dir, chosen, finished=9, **options):
    """Start a run and stop it, by default in the second block."""
    done = 0

    def stop(event):
        nonlocal done
        done += isinstance(event, Progress) and event.what == "quantize"
        if done == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(Location(llama), out_dir, chosen, emit=stop, **options)


@pytest.mark.parametrize(("finished", "measured"), [(9, 4), (10, 3), (14, 0)])
def test_resumed_run_measures_only_what_is_left(
    llama, text_file, tmp_path, monkeypatch, finished, measured
):
    """Two blocks of four inputs; the first three linears of each share one."""
    chosen, calls = recipe("gptq", text_file), []
    interrupted(llama, tmp_path / "out", chosen, finished)

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return sums.measure_inputs(*arguments, **keywords)

    monkeypatch.setattr(walk, "measure_inputs", counted)
    if not measured:
        monkeypatch.setattr(walk, "BlockModel", lambda *_: pytest.fail("the blocks were walked"))
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    assert len(calls) == measured


def test_resume_with_other_samples_is_refused(llama, text_file, tmp_path):
    chosen = recipe("gptq", text_file)
    for name, count in (("a", 6), ("b", 7)):
        section = recipe("gptq", text_file, num_samples=count).calibration
        assert section is not None
        pipeline.calibrate(Location(llama), tmp_path / name, section)
    interrupted(llama, tmp_path / "out", chosen, calib_dir=tmp_path / "a")
    with pytest.raises(QtoolError, match="another calibration"):
        pipeline.quantize(
            Location(llama), tmp_path / "out", chosen, resume=True, calib_dir=tmp_path / "b"
        )


def test_block_inputs_of_a_killed_run_are_not_in_the_checkpoint(llama, text_file, tmp_path):
    chosen = recipe("gptq", text_file, cache="disk")
    interrupted(llama, tmp_path / "out", chosen)
    left = tmp_path / "out.partial" / "streams"
    left.mkdir()
    (left / "original.stream").write_bytes(b"0" * 100)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    assert not (tmp_path / "out" / "streams").exists()


def test_data_lowers_the_error_of_the_outputs(llama, text_file, tmp_path):
    weights = {"method": "rtn", "scheme": SCHEME}
    pipeline.quantize(Location(llama), tmp_path / "rtn", recipe_from_mapping({"weights": weights}))
    plain = output_error(llama, tmp_path / "rtn")
    for method in METHODS:
        pipeline.quantize(Location(llama), tmp_path / method, recipe(method, text_file))
        assert output_error(llama, tmp_path / method) < plain


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"dataset": "no-such-text"}, "Known: .*wikitext2-test"),
        ({"dataset": "missing.txt"}, "No file missing.txt"),
        ({"sequence_length": 10_000}, "10000"),
    ],
)
def test_unusable_samples_are_one_sentence_and_leave_nothing(
    llama, text_file, tmp_path, calibration, message
):
    chosen = {"dataset": text_file, **calibration}
    with pytest.raises(QtoolError, match=message) as caught:
        pipeline.quantize(Location(llama), tmp_path / "out", recipe("gptq", **chosen))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_method_that_needs_data_says_so_without_it(llama, tmp_path):
    with pytest.raises(QtoolError, match="gptq"):
        pipeline.quantize(
            Location(llama), tmp_path / "out", recipe_from_mapping({"weights": {"method": "gptq"}})
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", *METHODS])
def test_group_dim_is_chosen_per_layer_by_the_held_out_error(llama, text_file, tmp_path, method):
    dims = ("in_features", "out_features")
    weights = {"method": method, "scheme": SCHEME, "choose": {"group_dim": list(dims)}}
    weights["options"] = QUICK.get(method, {})
    section = {"dataset": str(text_file), "num_samples": 6, "sequence_length": 64}
    result = pipeline.quantize(
        Location(llama),
        tmp_path / "out",
        recipe_from_mapping({"calibration": section, "weights": weights}),
    )
    for layer in result.layers:
        errors = {dim: layer.metrics[f"output_error_{dim}"] for dim in dims}
        chosen = errors[layer.entry.scheme.group_dim]
        assert layer.metrics["output_error"] == chosen
        if layer.entry.scheme.group_dim == "out_features":  # the second must be clearly better
            assert chosen < errors["in_features"]
    stored = CheckpointReader(tmp_path / "out").manifest.layers
    assert {n: e.scheme.group_dim for n, e in stored.items()} == {
        layer.name: layer.entry.scheme.group_dim for layer in result.layers
    }


@pytest.mark.parametrize("dims", [["in_features"], ["in_features", "out_features"]], ids=len)
def test_method_is_chosen_per_layer_by_the_held_out_error(llama, text_file, tmp_path, dims):
    weights = {"method": "gptq", "scheme": {"num_bits": 4, "group_size": None}}
    weights |= {"choose": {"method": ["gptq", "dint"], "group_dim": dims}}
    weights["options"] = QUICK["gptq"]
    section = {"dataset": str(text_file), "num_samples": 6, "sequence_length": 64}
    chosen = recipe_from_mapping({"calibration": section, "weights": weights})
    interrupted(llama, tmp_path / "out", chosen)  # what is kept of a layer says its method
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    for layer in result.layers:
        name = layer.entry.method
        if len(dims) > 1:
            name += f"_{layer.entry.scheme.group_dim}"
        assert layer.metrics["output_error"] == layer.metrics[f"output_error_{name}"]
        tried = [
            key for key in layer.metrics if key.startswith(("output_error_g", "output_error_d"))
        ]
        assert len(tried) == 2 * len(dims)
        best = min(layer.metrics[key] for key in tried)
        assert layer.metrics["output_error"] <= 1.02 * best
        assert layer.entry.format == {"gptq": "affine", "dint": "dint"}[layer.entry.method]
    assert {layer.entry.method for layer in result.layers} == {"gptq", "dint"}
    stored = CheckpointReader(tmp_path / "out").manifest
    assert {n: e.method for n, e in stored.layers.items()} == {
        layer.name: layer.entry.method for layer in result.layers
    }
    assert result.average_bits == stored.average_bits()
    assert output_error(llama, tmp_path / "out") < 0.5


def test_block_inputs_on_disk_give_the_same_bytes_and_leave_nothing(llama, text_file, tmp_path):
    for cache in ("memory", "disk"):
        chosen = recipe("gptq", text_file, cache=cache)
        pipeline.quantize(Location(llama), tmp_path / cache, chosen)
    first, second = (file_hashes(tmp_path / cache) for cache in ("memory", "disk"))
    assert first["model.safetensors"] == second["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


def test_report_compares_each_layer_with_rounding_to_nearest(llama, text_file, tmp_path):
    result = pipeline.quantize(Location(llama), tmp_path / "out", recipe("gptq", text_file))
    for key in ("output_error", "added_error"):
        better = [m[key] < m[f"{key}_rounded"] for m in metrics(result)]
        assert sum(better) >= 0.8 * len(better)
    for layer in result.layers:
        assert {"loss", "damping", "input_error_strength"} <= set(layer.metrics)
        assert layer.seconds > 0


def metrics(result):
    return [layer.metrics for layer in result.layers]


def test_few_tokens_are_warned_of_once_and_raise_the_damping(llama, text_file, tmp_path):
    events: list[Any] = []
    chosen = recipe("gptq", text_file, num_samples=2, sequence_length=20)
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen, emit=events.append)
    (message,) = [text for text in warnings_in(events) if "tokens" in text]
    assert "64 and 96 inputs" in message
    for layer in result.layers:
        ratio = layer.metrics["tokens_per_input"]
        assert layer.metrics["damping"] == pytest.approx(0.01 * FEW_TOKENS / ratio)


def test_damping_is_raised_only_where_tokens_are_few_and_never_above_one():
    assert raised(0.01, FEW_TOKENS) == 0.01
    assert raised(0.01, FEW_TOKENS / 2) == pytest.approx(0.02)
    assert raised(0.5, 0.2) == 1.0


def test_strict_run_fails_where_a_solver_falls_back(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("qtool.core.hessian.factor_inverse", lambda _damped, _order: None)
    loose = pipeline.quantize(Location(llama), tmp_path / "loose", recipe("gptq", text_file))
    assert all(layer.fallback for layer in loose.layers)
    with pytest.raises(QtoolError, match="can't be factored"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe("gptq", text_file, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["loose"]


def test_inputs_that_are_not_finite_end_the_run_with_the_layer_and_a_way_out(
    llama, text_file, tmp_path, monkeypatch
):
    def overflow(*_):
        return torch.full((64, 64), torch.inf)

    monkeypatch.setattr("qtool.walk.remembered.MOST_REMEMBERED", 0)
    monkeypatch.setattr("qtool.walk.blocks.Block.inputs_of", overflow)
    with pytest.raises(QtoolError, match=r"q_proj hold NaN or infinity.*float32 is the widest"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe("gptq", text_file))
    assert list(tmp_path.iterdir()) == []
