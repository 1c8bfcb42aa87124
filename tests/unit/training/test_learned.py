"""Weights that learn: gradients, codes, what every codec's `trainable` promises."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qtool.formats
from qtool import plugins
from qtool.base import QuantizedTensor, Trainable
from qtool.checkpoint.manifest import codec
from qtool.core import grouping, learned
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.helpers import normal
from tests.unit.training.solved import SOLVERS, solved

schemes = st.builds(
    WeightScheme,
    num_bits=st.integers(2, 8),
    group_size=st.one_of(st.none(), st.integers(3, 40)),
    group_dim=st.sampled_from(GROUP_DIMS),
    symmetric=st.booleans(),
)
shapes = st.builds(Shape2D, st.integers(2, 30), st.integers(2, 30))
THAT_LEARN = [name for name in plugins.names(qtool.formats) if codec(name).trainable is not None]
BY_STORED_BITS = {"encrypted_planes"}
"""Their codes aren't those of levels: test_compressed_training has them."""
EVERY_FORMAT = pytest.mark.parametrize("name", sorted(set(THAT_LEARN) - BY_STORED_BITS))


def dense(tensor: QuantizedTensor, values: torch.Tensor) -> torch.Tensor:
    """Return values of rows of groups as a weight."""
    joined = grouping.join(values, tensor.scheme.grouped_length(tensor.shape))
    return grouping.to_rows(joined, tensor.scheme)


def trainable(tensor: QuantizedTensor) -> Trainable:
    """Return where learning starts from a weight."""
    start = codec(tensor.format).trainable
    assert start is not None
    return start(tensor)


def values_of(
    start: Trainable, parameters: Mapping[str, torch.Tensor], codes: torch.Tensor
) -> torch.Tensor:
    """Return the values of rows of groups."""
    return learned.planes_values(*start.planes(parameters), codes)


def moved(start: Trainable, shifts: torch.Tensor) -> torch.Tensor:
    """Return the codes that shifts lead to."""
    return learned.moved_codes(*start.planes(start.parameters), start.codes, shifts)


def test_every_format_that_learns_has_a_solver_here():
    assert set(SOLVERS) | BY_STORED_BITS == set(THAT_LEARN)


@EVERY_FORMAT
@settings(max_examples=25)
@given(scheme=schemes, shape=shapes, seed=st.integers(0, 10_000))
def test_learning_begins_at_the_weight_and_stores_it_to_the_bit(name, scheme, shape, seed):
    tensor = solved(name, normal(*shape, seed=seed), scheme)
    start = trainable(tensor)
    values = values_of(start, start.parameters, start.codes)
    expected = codec(name).dequantize(tensor, torch.float32)
    torch.testing.assert_close(dense(tensor, values), expected, rtol=1e-5, atol=1e-6)
    stored = start.stored(start.parameters, start.codes)
    for part, tensor_of_it in tensor.parts.items():
        assert torch.equal(stored.parts[part], tensor_of_it), part


@EVERY_FORMAT
@settings(max_examples=25)
@given(scheme=schemes, shape=shapes, seed=st.integers(0, 10_000))
def test_codes_that_are_not_shifted_keep_their_levels(name, scheme, shape, seed):
    start = trainable(solved(name, normal(*shape, seed=seed), scheme))
    codes = moved(start, torch.zeros(start.codes.shape))
    before, after = (values_of(start, start.parameters, each) for each in (start.codes, codes))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@EVERY_FORMAT
@pytest.mark.parametrize(("share", "moves"), [(0.01, False), (3.0, True)])
def test_a_large_shift_moves_codes_and_a_small_one_does_not(name, share, moves):
    start = trainable(solved(name, normal(8, 32), WeightScheme(num_bits=2)))
    levels = values_of(start, start.parameters, start.codes)
    inwards = -share * levels.sign()
    codes = moved(start, inwards)
    changed = (values_of(start, start.parameters, codes) - levels).abs() > 1e-6
    assert bool(changed.any()) is moves


@EVERY_FORMAT
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_is_what_was_learned(name, symmetric):
    """Up to the rounding of float16, wherever the parameters have gone."""
    scheme = WeightScheme(num_bits=3, group_size=16, symmetric=symmetric)
    tensor = solved(name, normal(8, 40), scheme)
    start = trainable(tensor)
    generator = torch.Generator().manual_seed(0)
    learned_to = {
        key: value + 0.5 * start.units[key] * torch.randn(value.shape, generator=generator)
        for key, value in start.parameters.items()
    }
    values = values_of(start, learned_to, start.codes)
    stored = start.stored(learned_to, start.codes)
    found = codec(stored.format).dequantize(stored, torch.float32)
    torch.testing.assert_close(found, dense(tensor, values), rtol=4e-3, atol=4e-3)
    planes = "codes" if name == "affine" else "bit_planes"
    assert torch.equal(stored.parts[planes], tensor.parts[planes])


@settings(max_examples=20)
@given(
    bits=st.integers(1, 5), rows=st.integers(1, 4), groups=st.integers(1, 3), size=st.integers(1, 7)
)
def test_gradients_are_those_of_finite_differences(bits, rows, groups, size):
    generator = torch.Generator().manual_seed(bits + 10 * rows)
    scales = torch.rand(bits, rows, groups, generator=generator, dtype=torch.float64)
    offsets = torch.randn(rows, groups, generator=generator, dtype=torch.float64)
    codes = torch.randint(0, 2**bits, (rows, groups, size), generator=generator).to(torch.uint8)

    def values(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return learned.planes_values(scales, offsets, codes)

    inputs = scales.requires_grad_(), offsets.requires_grad_()
    assert torch.autograd.gradcheck(values, inputs)


def test_shifts_get_the_gradient_of_the_values_times_a_step_of_codes():
    scales, offsets = normal(2, 3, 2).abs().sort(0, descending=True).values, normal(3, 2)
    codes = torch.randint(0, 4, (3, 2, 5)).to(torch.uint8)
    shifts, grad = normal(3, 2, 5).requires_grad_(), normal(3, 2, 5)
    values = learned.planes_values(scales, offsets, codes, shifts)
    assert torch.equal(values, learned.values_of(scales, offsets, codes))
    values.backward(grad)
    assert shifts.grad is not None
    torch.testing.assert_close(shifts.grad, grad * 2 * scales[-1].unsqueeze(-1))


def test_gradient_goes_straight_through():
    source = torch.zeros(3, requires_grad=True)
    values = learned.with_gradient(torch.ones(3), source)
    assert values.tolist() == [1, 1, 1]
    (values * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert source.grad is not None
    assert source.grad.tolist() == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "size"), [(1, 5), (2, 64), (3, 192), (4, 1500)])
def test_kernels_do_what_torch_does(bits, size):
    from qtool.core import learned_kernels

    scales = normal(bits, 7, 3).abs().sort(0, descending=True).values.cuda()
    offsets = normal(7, 3).cuda()
    codes = torch.randint(0, 2**bits, (7, 3, size), dtype=torch.uint8).cuda()
    grad, shifts = normal(7, 3, size).cuda(), normal(7, 3, size).cuda()
    expected = learned.values_of(scales, offsets, codes)
    torch.testing.assert_close(learned_kernels.values(scales, offsets, codes), expected)
    expected = learned.sums_of(grad, codes, bits)
    torch.testing.assert_close(learned_kernels.sums(grad, codes, bits), expected, atol=1e-3, rtol=0)
    gaps = learned.gaps_of(scales)
    wanted = learned.values_of(scales, offsets, codes) + shifts * gaps.unsqueeze(-1)
    found = learned_kernels.moved(scales, offsets, codes, shifts, gaps)
    nearest = learned.moved_codes(*(x.cpu() for x in (scales, offsets, codes, shifts)))
    distances = [
        (learned.values_of(scales, offsets, each.cuda()) - wanted).abs()
        for each in (found, nearest)
    ]
    torch.testing.assert_close(*distances)


@EVERY_FORMAT
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_a_unit_moves_the_outermost_level_by_about_a_step_of_codes(name, num_bits):
    """Then one learning rate suits all widths."""
    start = trainable(solved(name, normal(8, 64), WeightScheme(num_bits=num_bits, group_size=32)))
    gap = learned.mean_gaps(start.planes(start.parameters)[0])

    parameters = {key: value.clone().requires_grad_() for key, value in start.parameters.items()}
    scales, offsets = start.planes(parameters)
    for outermost in (offsets + scales.sum(0), offsets - scales.sum(0)):
        keys = list(parameters)
        slopes = torch.autograd.grad(outermost.sum(), list(parameters.values()), retain_graph=True)
        for key, slope in zip(keys, slopes, strict=True):
            moved = (slope * start.units[key]).abs() / gap
            assert bool((moved < 2.5).all())
            assert name == "affine" or bool((moved > 0.4).all())  # one end of its range may stay
