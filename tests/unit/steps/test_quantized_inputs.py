"""Quantized inputs of linears through whole runs: what is found, stored, run and resumed."""

from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.activations import fake_quantize, quantize_activations
from qtool.errors import RecipeError
from qtool.modeling.load import load_model, load_original
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.decode.read_model import why_not
from qtool.scheme import ActivationScheme
from qtool.steps import solve_layer
from qtool.steps.solve_calibrated import solve_calibrated
from qtool.training.student import LearnedLinear
from tests.helpers import dequantized, file_hashes

STATIC = {"granularity": "tensor"}


def recipe(dataset: object = None, *, method: str = "rtn", tuning: Any = None, **activations: Any):
    sections: dict[str, Any] = {
        "weights": {"method": method, "scheme": {"num_bits": 4, "group_size": 32}},
        "activations": activations,
    }
    if method == "gptq":
        sections["weights"]["options"] = {"polish_rounds": 1}
    if tuning is not None:
        sections["tuning"] = tuning
    if dataset is not None:
        section = {"dataset": str(dataset), "num_samples": 8, "sequence_length": 32}
        sections["calibration"] = section
    return recipe_from_mapping(sections)


def entries(directory):
    return CheckpointReader(directory).manifest.layers


def inputs_of(model, names, ids):
    """Return what linears see."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, arguments, name=name: seen.update({name: arguments[0]})
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_each_linear_of_the_blocks_gets_a_step_per_token_without_data(llama, tmp_path):
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(num_bits=6, clip_ratio=0.9))
    found = {entry.activation for entry in entries(tmp_path / "out").values()}
    assert found == {ActivationScheme(num_bits=6, clip_ratio=0.9)}
    assert CheckpointReader(tmp_path / "out").manifest.format_version == 2


def test_tables_and_skipped_layers_stay_in_16_bit(llama, tmp_path):
    wanted = recipe_from_mapping(
        {
            "weights": {
                "method": "rtn",
                "scheme": {"num_bits": 4, "group_size": 32},
                "overrides": [{"match": "*.q_proj", "skip": True}],
            },
            "embedding": {"method": "rtn", "scheme": {"num_bits": 4, "group_size": 32}},
            "activations": {},
        }
    )
    pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    found = entries(tmp_path / "out")
    assert not any(name.endswith("q_proj") for name in found)
    assert found["model.embed_tokens"].activation is None
    assert found["model.layers.0.mlp.up_proj"].activation == ActivationScheme()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("rule", ["max", "percentile", "mse"])
def test_steps_per_tensor_are_found_and_shared_by_linears_of_one_input(
    llama, text_file, tmp_path, method, rule
):
    options = {"percentile": 98.0} if rule == "percentile" else {}
    wanted = recipe(text_file, method=method, **STATIC, range=rule, **options)
    pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    found = {name: entry.activation for name, entry in entries(tmp_path / "out").items()}
    assert all(scheme.granularity == "tensor" for scheme in found.values())
    block = "model.layers.1"
    q, k, v = (found[f"{block}.self_attn.{name}_proj"] for name in "qkv")
    assert q == k == v
    assert q != found[f"{block}.mlp.up_proj"] == found[f"{block}.mlp.gate_proj"]


def test_the_largest_value_is_covered_and_rules_cut_more(llama, text_file, tmp_path):
    steps = {}
    for rule in ("max", "percentile", "mse"):
        cut: dict[str, Any] = {"percentile": 95.0} if rule == "percentile" else {}
        wanted = recipe(text_file, **STATIC, num_bits=4, range=rule, **cut)
        pipeline.quantize(Location(llama), tmp_path / rule, wanted)
        steps[rule] = entries(tmp_path / rule)["model.layers.0.mlp.down_proj"].activation.scale
    assert steps["percentile"] < steps["max"]
    assert steps["mse"] < steps["max"]


def test_steps_per_tensor_without_data_are_refused(llama, tmp_path):
    with pytest.raises(RecipeError, match=r"granularity is 'tensor'.*section 'calibration'"):
        pipeline.quantize(Location(llama), tmp_path / "out", recipe(**STATIC))
    assert not (tmp_path / "out").exists()


def test_layers_are_measured_and_walked_with_quantized_inputs(
    llama, text_file, tmp_path, monkeypatch
):
    """At two bits the inputs lose so much that later layers see something else."""
    measured = []
    original = solve_calibrated

    def spy(layer, weight, statistics, *rest):
        measured.append((layer.name, statistics[0]))
        return original(layer, weight, statistics, *rest)

    monkeypatch.setattr(solve_layer, "solve_calibrated", spy)
    plain = recipe(text_file, method="gptq").model_copy(update={"activations": None})
    pipeline.quantize(Location(llama), tmp_path / "plain", plain)
    before, measured = dict(measured), []
    pipeline.quantize(
        Location(llama), tmp_path / "out", recipe(text_file, method="gptq", num_bits=2)
    )
    after = dict(measured)
    first = "model.layers.0.self_attn.q_proj"
    assert after[first].activation == ActivationScheme(num_bits=2)
    lost = [each[first].held_out.mean("dd").diagonal().sum() for each in (before, after)]
    assert lost[0] == 0 < lost[1], "the first linear's inputs differ by their quantization alone"


@pytest.mark.parametrize("activations", [{}, STATIC], ids=["token", "tensor"])
def test_resumed_run_gives_the_bytes_of_an_unbroken_one(
    llama, text_file, tmp_path, monkeypatch, activations
):
    wanted = recipe(text_file, method="gptq", **activations)
    pipeline.quantize(Location(llama), tmp_path / "whole", wanted)
    calls, original = [], solve_calibrated

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(solve_layer, "solve_calibrated", stop)
        pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    pipeline.quantize(Location(llama), tmp_path / "out", wanted, resume=True)
    whole, out = (file_hashes(tmp_path / name) for name in ("whole", "out"))
    assert whole["model.safetensors"] == out["model.safetensors"]
    assert entries(tmp_path / "whole") == entries(tmp_path / "out")


@pytest.mark.parametrize("activations", [{}, STATIC], ids=["token", "tensor"])
def test_a_loaded_model_runs_as_its_entries_say(llama, text_file, tmp_path, activations):
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(text_file, **activations))
    with use_backend("dense"):  # the entries' meaning, not what a CPU's tables make of it
        model = load_model(Location(tmp_path / "out"), dtype=torch.float32).model
    reason = why_not(model)
    assert reason is not None
    assert "inputs of its linear layers are quantized" in reason
    ids = torch.arange(3, 20).view(1, -1)
    names = [name for name, entry in entries(tmp_path / "out").items() if entry.activation]
    for name, x in inputs_of(model, names, ids).items():
        linear = model.get_submodule(name)
        codes, steps = quantize_activations(x, linear.entry.activation)
        tensor = linear.tensor()
        exact = (codes.double() @ dequantized(tensor, torch.float64).T) * steps
        torch.testing.assert_close(linear(x).double(), exact, rtol=1e-4, atol=1e-5)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape == (1, ids.shape[1] + 5)


def test_eight_bits_change_little_and_two_much(llama, text_file, tmp_path):
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        wanted = load_original(llama, "cpu").float()(ids).logits
        lost = []
        for bits in (8, 2):
            out = tmp_path / str(bits)
            pipeline.quantize(Location(llama), out, recipe(text_file, num_bits=bits))
            model = load_model(Location(out), dtype=torch.float32).model
            lost.append(float((model(ids).logits - wanted).square().mean()))
    assert lost[0] < lost[1]


@pytest.mark.parametrize(
    "tuning",
    [
        {"blocks": {"steps": 4, "learning_rate": 1e-2}},
        {"end_to_end": {"steps": 4, "batch_size": 2, "sequence_length": 32, "learning_rate": 1e-2}},
    ],
    ids=["blocks", "end_to_end"],
)
def test_what_learns_sees_quantized_inputs(llama, text_file, tmp_path, monkeypatch, tuning):
    seen = set()
    original = LearnedLinear.forward

    def forward(self, x):
        seen.add(self.activation)
        return original(self, x)

    monkeypatch.setattr(LearnedLinear, "forward", forward)
    wanted = recipe(text_file, method="gptq", tuning=tuning)
    pipeline.quantize(Location(llama), tmp_path / "out", wanted)
    assert seen == {ActivationScheme()}
    assert {e.activation for e in entries(tmp_path / "out").values()} == {ActivationScheme()}


def test_gradients_go_straight_through_quantized_inputs(checkpoint):
    tensor = CheckpointReader(checkpoint).load("model.layers.0.mlp.up_proj")
    assert isinstance(tensor, QuantizedTensor)
    layer = LearnedLinear(tensor, None, moves_codes=False)
    x = torch.randn(5, layer.weight().shape[1], requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.activation = ActivationScheme(num_bits=3)
    y = layer(x)
    torch.testing.assert_close(y, fake_quantize(x, layer.activation) @ layer.weight().T)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], plain)
