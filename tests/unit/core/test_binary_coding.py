import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import binary_coding
from tests.helpers import normal

bit_widths = st.integers(1, 8)
seeds = st.integers(0, 10_000)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def values(codes, scales, offsets, dtype):
    return binary_coding.levels(scales.to(dtype), offsets.to(dtype)).gather(-1, codes.long())


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_signs_spell_the_code_with_plane_0_most_significant(num_bits):
    signs = binary_coding.signs(num_bits, device=torch.device("cpu"), dtype=torch.float32)
    spelled = ["".join("1" if sign > 0 else "0" for sign in row) for row in signs.tolist()]
    assert [int(word, 2) for word in spelled] == list(range(2**num_bits))


@given(num_bits=bit_widths, seed=seeds)
def test_assigned_code_is_the_nearest_level_by_brute_force(num_bits, seed):
    groups = normal(5, 33, seed=seed)
    scales = normal(5, num_bits, seed=seed + 1).half()  # any sign and order
    offsets = normal(5, seed=seed + 2).half()
    codes = binary_coding.assign(groups, scales, offsets)
    got = values(codes, scales, offsets, torch.float64)
    levels = binary_coding.levels(scales.double(), offsets.double())
    nearest = (groups.double().unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    assert bool(((groups.double() - got).abs() <= nearest + 1e-5).all())


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_zero_weight_on_a_symmetric_grid_goes_up(num_bits):
    scales = 2.0 ** torch.arange(num_bits - 1, -1, -1).expand(1, -1)
    for zero in (0.0, -0.0):
        codes = binary_coding.assign(torch.full((1, 4), zero), scales, torch.zeros(1))
        assert codes.tolist() == [[2 ** (num_bits - 1)] * 4]


@given(num_bits=bit_widths, seed=seeds)
def test_canonical_form_leaves_the_dequantized_weights_unchanged(num_bits, seed):
    # Small dyadic numbers: sums are exact in any order.
    scales = integers(-64, 65, (6, num_bits), seed).float() / 16
    offsets = integers(-64, 65, (6,), seed + 1).float() / 16
    codes = integers(0, 2**num_bits, (6, 21), seed + 2).to(torch.uint8)
    before = values(codes, scales, offsets, torch.float64)
    new_scales, new_codes = binary_coding.canonical(scales, codes)
    after = values(new_codes, new_scales, offsets, torch.float64)
    assert torch.equal(before, after)
    assert bool((new_scales >= 0).all())
    assert bool((new_scales.diff(dim=-1) <= 0).all())


@given(num_bits=bit_widths, seed=seeds)
def test_canonical_form_is_a_fixed_point(num_bits, seed):
    scales = normal(4, num_bits, seed=seed)
    codes = integers(0, 2**num_bits, (4, 9), seed).to(torch.uint8)
    once = binary_coding.canonical(scales, codes)
    twice = binary_coding.canonical(*once)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@given(num_bits=bit_widths, seed=seeds)
def test_affine_levels_equal_binary_coded_levels_exactly_in_float64(num_bits, seed):
    scales = normal(20, seed=seed).abs().half().double()
    # Zero points outside the range of codes as well.
    zero_points = integers(-300, 600, (20,), seed).double()
    plane_scales, offsets = binary_coding.scales_from_affine(scales, zero_points, num_bits=num_bits)
    codes = torch.arange(2**num_bits)
    affine = (codes - zero_points.unsqueeze(-1)) * scales.unsqueeze(-1)
    assert torch.equal(binary_coding.levels(plane_scales, offsets), affine)
