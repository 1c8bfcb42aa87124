"""Biases take away the mean error of a linear's output, and a checkpoint holds them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from qtool import pipeline
from qtool.base import Env, Notice, Progress
from qtool.checkpoint.reader import CheckpointReader
from qtool.data.calibration import CalibrationSet
from qtool.errors import RecipeError
from qtool.modeling.device import use_device
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.steps.correct_biases import correct_block, mean_outputs
from qtool.walk.observe import observe_outputs
from qtool.walk.solved import SolvedLinear
from qtool.walk.streams import Visit
from qtool.walk.walk import Walk
from tests.helpers import QUICK_BCQ, file_hashes, warnings_in

SCHEME = {"num_bits": 2, "group_size": 32}
BY_ROWS = {
    "dint": {"num_bits": 4, "group_size": None},
    "bcq": {"num_bits": 1, "group_size": None},
}
OPTIONS = {"rtn": {}, "gptq": {"polish_rounds": 1}, "bcq": dict(QUICK_BCQ), "dint": {}}
GROUPS = (("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))
NAMES = [name for group in GROUPS for name in group]


def recipe(dataset, method="rtn", *, sections=None, **calibration):
    # dint and bcq by rows: in groups of 32 their errors are so small that rounding decides
    section = {"dataset": str(dataset), "num_samples": 24, "sequence_length": 48, **calibration}
    weights = {
        "method": method,
        "scheme": BY_ROWS.get(method, SCHEME),
        "options": OPTIONS[method],
    }
    return recipe_from_mapping({"calibration": section, "weights": weights, **(sections or {})})


@pytest.fixture
def visit(tiny):
    """Return the first block of a tiny OPT with coarse weights, its samples, its biases."""
    source = open_source(Location(tiny("opt")))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 96, (48,), generator=generator) for _ in range(8)]
    layers = {name: source.weight_shape(name) for name in source.block_linears()}
    section = recipe("x", holdout=0.25).calibration
    walk = Walk(source, layers, CalibrationSet(tuple(tokens), {}), section, Env(device="cpu"))
    for name in layers:
        weight = source.read_weight(name)
        coarse = weight + 0.02 + 0.05 * torch.randn(weight.shape, generator=generator)
        walk.put(name, SolvedLinear(partial(torch.clone, coarse)))
    biases = {name: source.read(f"model.decoder.layers.0.{name}.bias") for name in NAMES}
    return walk.visit(0), biases, source.residual


def mean_errors(visit: Visit, block, residual):
    """Return the largest mean error of each linear's output, over samples not held out."""
    streams = visit.streams
    want = mean_outputs(visit.original, NAMES, streams.original[: streams.num_train], residual)
    got = mean_outputs(block, NAMES, streams.quantized[: streams.num_train], residual)
    return {name: float((want[name] - got[name]).abs().max()) for name in NAMES}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("start", range(len(GROUPS)))
def test_the_mean_error_of_an_output_falls_to_nothing(visit, start, streams):
    visit, biases, residual = visit
    residual, groups = residual if streams else None, GROUPS[start:]
    biases = {name: bias.float() for name, bias in biases.items()}
    found = correct_block(visit, groups, biases, residual)
    assert found.after < 0.9 * found.before
    before = mean_errors(visit, visit.quantized, residual)
    block = visit.quantized.copy()
    for name, bias in found.biases.items():
        block.set_bias(name, bias)
    after = mean_errors(visit, block, residual)
    assert "fc2" in found.biases
    assert all(before[name] > 1e-3 and after[name] < 1e-5 for name in found.biases)


def test_means_are_those_of_outputs_and_of_the_stream_behind_them(visit):
    visit, _, residual = visit
    hidden, block = visit.streams.original[:1], visit.original
    seen, output = observe_outputs(block, NAMES, hidden[0], 0)
    plain, streamed = (mean_outputs(block, NAMES, hidden, one) for one in (None, residual))
    for name in NAMES:
        torch.testing.assert_close(plain[name], seen[name].double().mean(0))
    stream = hidden[0].flatten(0, -2) + seen["self_attn.out_proj"]
    torch.testing.assert_close(streamed["self_attn.out_proj"], stream.double().mean(0))
    torch.testing.assert_close(streamed["fc2"], output.flatten(0, -2).double().mean(0))
    assert torch.equal(streamed["fc1"], plain["fc1"])


def test_it_is_the_weights_error_on_the_mean_input_where_nothing_came_before(visit):
    """Queries of the first block see what they see in the original."""
    visit, _, _ = visit
    name, streams = NAMES[0], visit.streams
    train = [
        mean_outputs(one, [name], streams.original[: streams.num_train], None)[name]
        for one in (visit.original, visit.quantized)
    ]
    inputs = torch.cat(
        [visit.original.inputs_of(name, streams.original[i], i) for i in range(streams.num_train)]
    )
    weights = [
        block.module.get_submodule(name).weight for block in (visit.original, visit.quantized)
    ]
    change = (weights[0] - weights[1]).double() @ inputs.double().mean(0)
    torch.testing.assert_close(train[0] - train[1], change, atol=1e-6, rtol=1e-4)


def test_biases_that_make_held_out_samples_worse_stay(visit):
    visit, biases, residual = visit
    streams = visit.streams
    odd = tuple(  # where they are held out, the quantized model is the original
        first if batch >= streams.num_train else second + 3
        for batch, (first, second) in enumerate(
            zip(streams.original, streams.quantized, strict=True)
        )
    )
    turned = Visit(visit.original, visit.original.copy(), replace(streams, quantized=odd))
    found = correct_block(turned, GROUPS, biases, residual)
    assert found.biases == {}
    assert found.after == found.before


@pytest.mark.parametrize("method", sorted(OPTIONS))
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_checkpoint_has_them_and_gives_what_the_walk_saw(
    tiny, text_file, tmp_path, family, method
):
    model = tiny(family)
    chosen = recipe(text_file, method, bias_correction=True)
    result = pipeline.quantize(Location(model), tmp_path / "out", chosen)
    report = result.bias_correction
    assert len(report) == 2  # blocks
    assert all(each["after"] <= each["before"] for each in report.values())
    corrected = [name for each in report.values() for name in each["biases"]]
    assert corrected
    source, reader = open_source(Location(model)), CheckpointReader(tmp_path / "out")
    loaded = load_model(Location(tmp_path / "out")).model
    for name in (one for one in source.names() if one.endswith(".bias")):
        stored = reader.load(name)
        assert isinstance(stored, torch.Tensor)
        assert stored.dtype == source.read(name).dtype
        assert torch.equal(stored, source.read(name)) == (name not in corrected)
        assert torch.equal(stored, loaded.get_parameter(name).to(stored.dtype))
    again = pipeline.quantize(Location(model), tmp_path / "out", chosen, resume=True)
    assert again.bias_correction == report


@pytest.mark.parametrize("family", ["bloom", "gpt_neox"])
def test_it_takes_fused_values_and_blocks_without_one_residual_stream(
    tiny, text_file, tmp_path, family
):
    chosen = recipe(text_file, bias_correction=True)
    report = pipeline.quantize(Location(tiny(family)), tmp_path / "out", chosen).bias_correction
    assert all(each["after"] < each["before"] for each in report.values())
    load_model(Location(tmp_path / "out"))


@pytest.mark.parametrize(
    ("device", "dtype", "within"),
    [
        ("cpu", "float16", 2e-3),
        pytest.param("cuda", "float32", 1e-4, marks=pytest.mark.gpu),
        pytest.param("cuda", "auto", 2e-3, marks=pytest.mark.gpu),
    ],
)
def test_the_same_weights_are_corrected_alike_wherever_blocks_run(
    tiny, text_file, tmp_path, device, dtype, within
):
    """Weights must be the same: those solved for drifting inputs turn 1e-7 of them into 12 %."""
    model, reports, stored = Location(tiny("opt")), [], []
    for place, kind in (("cpu", "float32"), (device, dtype)):
        chosen = recipe(text_file, bias_correction=True, input_error=0, dtype=kind)
        out = tmp_path / f"{place} {kind}"
        with use_device(place):
            result = pipeline.quantize(model, out, chosen)
        reports.append(result.bias_correction)
        stored.append(load_file(out / "model.safetensors"))
    for block, first in reports[0].items():
        second = reports[1][block]
        assert first["biases"] == second["biases"]
        for key in ("before", "after"):
            assert first[key] == pytest.approx(second[key], rel=within)
        assert first["after"] < 0.9 * first["before"]
        for name in first["biases"]:
            old = open_source(model).read(name).double()
            ours, theirs = (one[name].double() - old for one in stored)
            assert float((ours - theirs).norm() / ours.norm()) < within + 1e-3  # stored: 16 bits


@pytest.mark.gpu
def test_a_card_corrects_what_it_solves_itself(tiny, text_file, tmp_path):
    chosen = recipe(text_file, bias_correction=True)
    with use_device("cuda"):
        result = pipeline.quantize(Location(tiny("opt")), tmp_path / "out", chosen)
    assert all(each["after"] < 0.9 * each["before"] for each in result.bias_correction.values())


def test_an_interrupted_run_resumes_to_the_same_bytes(tiny, text_file, tmp_path):
    chosen, model = recipe(text_file, "gptq", bias_correction=True), Location(tiny("opt"))
    pipeline.quantize(model, tmp_path / "whole", chosen)
    for stop in ("correct biases", "quantize"):
        done = 0

        def interrupt(event, stop=stop):
            nonlocal done
            done += isinstance(event, Progress) and event.what == stop
            if done == (1 if stop == "correct biases" else 9):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(model, tmp_path / stop, chosen, emit=interrupt)
        pipeline.quantize(model, tmp_path / stop, chosen, resume=True)
        for name in ("model.safetensors", "config.json"):
            assert file_hashes(tmp_path / stop)[name] == file_hashes(tmp_path / "whole")[name]


@pytest.mark.parametrize(
    "sections",
    [
        {"activations": {"num_bits": 8, "granularity": "tensor"}, "fold": {"name": "smoothquant"}},
        {"tuning": {"blocks": {"steps": 4}}},
    ],
    ids=["quantized inputs, folded", "tuned blocks"],
)
def test_it_goes_with_folds_quantized_inputs_and_tuned_blocks(tiny, text_file, tmp_path, sections):
    chosen = recipe(text_file, bias_correction=True, sections=sections)
    result = pipeline.quantize(Location(tiny("opt")), tmp_path / "out", chosen)
    assert any(each["after"] < each["before"] for each in result.bias_correction.values())
    load_model(Location(tmp_path / "out"))


def test_linears_without_biases_are_told_of(llama, text_file, tmp_path):
    events: list[Progress | Notice] = []
    chosen = recipe(text_file, bias_correction=True)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, emit=events.append)
    pipeline.quantize(Location(llama), tmp_path / "plain", recipe(text_file))
    (said,) = (one for one in warnings_in(events) if "bias_correction" in one)
    assert "14 of 14 linears have no bias" in said
    names = ["model.safetensors"]
    for name in names:
        assert file_hashes(tmp_path / "out")[name] == file_hashes(tmp_path / "plain")[name]


def test_it_is_written_only_where_it_is_asked_for(text_file):
    assert "bias_correction" not in recipe(text_file).model_dump()["calibration"]
    asked = recipe(text_file, bias_correction=True).model_dump()
    assert asked["calibration"]["bias_correction"] is True


def test_end_to_end_tuning_learns_biases_itself(text_file):
    with pytest.raises(RecipeError, match="leave bias_correction out"):
        recipe(text_file, bias_correction=True, sections={"tuning": {"end_to_end": {"steps": 4}}})
