"""Linears whose inputs are quantized, timed on the fakes of a card."""

from dataclasses import asdict

import torch

from qtool.checkpoint.manifest import LayerEntry
from qtool.cli.tables.kernels import gpu_report
from qtool.scheme import ActivationScheme, Shape2D, WeightScheme
from qtool.timing import gpu, quantized_inputs, workload
from qtool.timing.quantized_inputs import InputCase, input_cases, time_quantized_inputs
from qtool.timing.shapes import find_shapes
from tests.helpers import dequantized
from tests.unit.timing.rig import bench, rig


def case(scheme):
    entry = LayerEntry(
        format="affine",
        scheme=scheme,
        shape=Shape2D(24, 256),
        method="random",
        activation=ActivationScheme(),
    )
    return InputCase("down", entry)


def test_all_linears_of_the_blocks_are_timed_with_each_kind_of_weight_and_no_head():
    cases = input_cases(find_shapes("llama3-8b"), ActivationScheme())
    assert {each.name for each in cases} == {"qkv", "o", "gate_up", "down"}
    assert len(cases) == 4 * len(quantized_inputs.WEIGHT_KINDS)
    assert all(each.entry.activation == ActivationScheme() for each in cases)


def test_a_linear_is_timed_at_each_number_of_tokens(monkeypatch):
    monkeypatch.setattr(quantized_inputs, "MANY_TOKENS", (1, 70))
    for scheme in quantized_inputs.WEIGHT_KINDS:
        times = time_quantized_inputs(case(scheme), rig())
        assert [point.tokens for point in times.points] == [1, 70]
        assert {point.kernel for point in times.points} == {"floats"}  # on a CPU
        assert all(point.speedup > 0 for point in times.points)


def test_outputs_of_random_weights_are_about_unit_normal():
    generator = torch.Generator().manual_seed(0)
    for scheme in quantized_inputs.WEIGHT_KINDS:
        shape = Shape2D(64, 512)
        tensor = quantized_inputs.random_affine(shape, scheme, generator)
        y = torch.randn(32, 512, generator=generator) @ dequantized(tensor).T
        assert 0.3 < float(y.std()) < 3


def test_a_run_reports_them_only_if_asked(monkeypatch):
    monkeypatch.setattr(quantized_inputs, "MANY_TOKENS", (1,))
    scheme = WeightScheme(num_bits=4, group_size=128)
    asked = workload.Workload("some", (), (), "", (case(scheme),))
    result = gpu.time_workload(asked, bench(), {})
    assert gpu_report(result)["quantized_inputs"][0] == asdict(result.quantized_inputs[0])
    plain = gpu.time_workload(workload.Workload("none", (), ()), bench(), {})
    assert "quantized_inputs" not in gpu_report(plain)
