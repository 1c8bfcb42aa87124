import dataclasses

import pytest
import torch

from qtool.runtime.backends.cuda import linear_kernels
from qtool.scheme import Shape2D, WeightScheme
from qtool.timing import kernels
from qtool.timing.kernels import BATCHES, Layer, SweepPoint, break_even, kernel_row
from qtool.timing.synthetic import generator_on, random_tensor, random_weight
from tests.unit.timing.rig import COPY_BANDWIDTH, CountingTimer, rig

SHAPE = Shape2D(96, 64)
SCHEME = WeightScheme(num_bits=2, group_size=32)
STORED = 2 * 96 * 64 // 8 + (2 + 1) * 96 * 2 * 2
CPU = torch.device("cpu")


def layer(keep_stored=False):
    def load():
        tensor = random_tensor(SHAPE, SCHEME, generator_on(CPU))
        return linear_kernels.prepare(tensor, torch.float16, keep_stored=keep_stored)

    return Layer("down", 3, load)


def test_row_of_the_reference_table():
    shape = Shape2D(28672, 4096)  # float16 on an H100, shared/reference_numbers.md
    row = kernel_row(
        *("fp16 cuBLAS", "", 87.7e-6, 2 * 28672 * 4096, shape),
        copy_bandwidth=2.93e12,
        fp16_seconds=87.7e-6,
    )
    assert row.gb_per_second == pytest.approx(2678, rel=1e-3)
    assert row.gb_per_second_with_activations == pytest.approx(2679, rel=1e-3)
    assert row.of_copy_bandwidth == pytest.approx(0.914, rel=1e-3)
    assert row.speedup == 1


def point(tokens, speedup):
    return SweepPoint(tokens, "planes", 1.0, speedup, speedup)


def test_break_even_is_the_first_batch_at_which_float16_is_faster():
    assert break_even([point(1, 3.0), point(8, 1.0), point(16, 0.9), point(32, 1.1)]) == 16
    assert break_even([point(1, 3.0), point(64, 1.2)]) is None
    assert break_even([point(1, 0.5)]) == 1


def test_bytes_are_those_of_the_stored_parts():
    assert kernels.stored_bytes(layer().load()) == STORED


def test_a_layer_is_timed_at_every_batch_size_and_beside_float16():
    timer = CountingTimer()
    result = kernels.time_layer(layer(), rig(timer))
    assert [p.tokens for p in result.sweep] == list(BATCHES)
    assert [p.kernel for p in result.sweep] == ["planes"] * 5 + ["dequantize"] * 2
    assert min(timer.calls) >= 20
    ours, fp16 = result.rows
    assert (ours.what, ours.kernel, ours.weight_bytes) == ("qtool", "planes", STORED)
    assert ours.microseconds == pytest.approx(1.0)
    assert ours.of_copy_bandwidth == pytest.approx(STORED / 1e-6 / COPY_BANDWIDTH)
    assert (fp16.what, fp16.kernel, fp16.weight_bytes) == ("fp16 cuBLAS", "", 2 * 96 * 64)
    assert (result.out_features, result.in_features, result.count) == (96, 64, 3)
    assert result.break_even is None


def test_the_kernel_asked_for_is_the_one_that_is_launched():
    launched = []
    own = dataclasses.replace(
        rig(), launch=lambda call, _: launched.append(call.kernel), kernel="sign_flip"
    )
    result = kernels.time_layer(layer(keep_stored=True), own)
    assert set(launched) == {"sign_flip"}
    assert {p.kernel for p in result.sweep} == {"sign_flip"}


def test_inputs_are_random_and_the_same_in_every_run():
    x = kernels.inputs(4, 64, torch.float16, CPU)
    assert bool((x != 0).any(1).all())
    assert torch.equal(x, kernels.inputs(4, 64, torch.float16, CPU))


def test_a_head_of_unlike_rows_is_timed_by_the_bytes_of_its_classes():
    scheme = WeightScheme(num_bits=4, group_size=32, rows=((4, 30), (2, 66)))

    def load():
        return random_weight(SHAPE, scheme, generator_on(CPU))

    result = kernels.time_layer(Layer("head", 1, load), rig())
    classes = (4 * 64 // 8 + 5 * 2 * 2) * 30 + (2 * 64 // 8 + 3 * 2 * 2) * 66
    assert result.rows[0].weight_bytes == classes
    assert result.rows[0].kernel == "planes"
    assert result.row_bits == (4, 2)
    launched = []
    own = dataclasses.replace(rig(), launch=lambda call, _: launched.append(call))
    kernels.time_layer(Layer("head", 1, load), own)
    together = {call.numbers[5:] for call in launched if call.kernel == "bit_plane_classes"}
    assert together == {(30, 2, 1, 66, 5, 1, *[0] * 6)}, "rows, tiles and blocks of each class"
    by_itself = {call.numbers[0] for call in launched if call.kernel == "dequantize"}
    assert by_itself == {30, 66}, "of many tokens"
