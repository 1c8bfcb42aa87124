import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import affine
from qtool.scheme import GROUP_DIMS, WeightScheme
from qtool.steps.plan import load_method
from tests.helpers import dequantized, normal, problem

bit_widths = st.integers(1, 8)


def fit(groups, num_bits, *, symmetric=False, clip_ratio=1.0):
    return affine.fit_min_max(groups, num_bits=num_bits, symmetric=symmetric, clip_ratio=clip_ratio)


def nearest_error(groups, scales, zero_points, num_bits):
    """Return the distance to the nearest of all stored levels, by trying each, float64."""
    codes = torch.arange(2**num_bits).view(1, 1, 1, -1)
    levels = (codes - zero_points.double()[..., None, None]) * scales.double()[..., None, None]
    return (groups.double().unsqueeze(-1) - levels).abs().amin(-1)


@given(
    num_bits=bit_widths,
    symmetric=st.booleans(),
    shift=st.sampled_from([-5.0, -0.1, 0.0, 0.3, 100.0]),
    clip_ratio=st.sampled_from([1.0, 0.7, 0.05]),
    seed=st.integers(0, 1000),
)
def test_codes_are_the_nearest_stored_level(num_bits, symmetric, shift, clip_ratio, seed):
    groups = normal(3, 2, 17, seed=seed) + shift
    scales, zeros = fit(groups, num_bits, symmetric=symmetric, clip_ratio=clip_ratio)
    codes = affine.nearest_codes(groups, scales, zeros, num_bits=num_bits)
    got = affine.affine_values(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1), torch.float64)
    error = (groups.double() - got).abs()
    rounding = 1e-5 * groups.abs().max()  # the quotient is formed in float32
    assert bool((error <= nearest_error(groups, scales, zeros, num_bits) + rounding).all())


@given(num_bits=bit_widths, symmetric=st.booleans())
def test_zero_is_reproduced_exactly(num_bits, symmetric):
    groups = normal(4, 3, 16)
    groups[..., ::5] = 0
    scales, zeros = fit(groups, num_bits, symmetric=symmetric)
    codes = affine.nearest_codes(groups, scales, zeros, num_bits=num_bits)
    got = affine.affine_values(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1), torch.float32)
    assert not bool(got[..., ::5].any())


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-9])
def test_scales_never_round_to_zero(num_bits, magnitude):
    scales, zeros = fit(magnitude * normal(2, 2, 8), num_bits)
    assert bool((scales > 0).all())
    assert int(zeros.max()) < 2**num_bits


@given(
    num_bits=st.integers(2, 8),
    one_sided=st.sampled_from([1.0, -1.0]),
    size=st.integers(1, 64),
)
def test_range_that_excludes_zero_is_widened_not_shifted(num_bits, one_sided, size):
    groups = one_sided * (normal(1, 1, size).abs() + 3)
    scales, zeros = fit(groups, num_bits)
    codes = affine.nearest_codes(groups, scales, zeros, num_bits=num_bits)
    got = affine.affine_values(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1), torch.float32)
    assert float((got - groups).abs().max()) <= 0.51 * float(scales.float().max()) + 1e-2
    assert int(zeros) == (0 if one_sided > 0 else 2**num_bits - 1)


def test_symmetric_zero_point_is_the_middle_code():
    _, zeros = fit(normal(3, 2, 8), 4, symmetric=True)
    assert zeros.unique().tolist() == [8]


def test_clipping_shrinks_the_scale_in_proportion():
    groups = normal(3, 2, 64)
    whole, half = (fit(groups, 4, clip_ratio=ratio)[0].double() for ratio in (1.0, 0.5))
    assert torch.allclose(half, whole / 2, rtol=1e-3)


@given(num_bits=bit_widths, rounding=st.floats(-0.25, 0.25), seed=st.integers(0, 1000))
def test_a_shift_moves_thresholds_towards_zero_alike_on_both_sides(num_bits, rounding, seed):
    groups = normal(3, 2, 17, seed=seed)
    scales, zeros = fit(groups, num_bits, symmetric=True)
    zeros = zeros.float()
    widest = 2 ** (num_bits - 1) - 1  # beyond it the grid has a level on one side only

    def steps(values, shift):
        found = affine.nearest_codes(values, scales, zeros, num_bits=num_bits, rounding=shift)
        return (found.float() - zeros.unsqueeze(-1)).clamp(-widest, widest)

    shifted, plain = steps(groups, rounding), steps(groups, 0.0)
    assert torch.equal(steps(-groups, rounding), -shifted)
    moved = (shifted - plain) * groups.sign()
    assert set(moved.unique().tolist()) <= {0.0, -1.0 if rounding > 0 else 1.0}
    exact = (groups / scales.float().unsqueeze(-1)).abs()
    in_band = (exact % 1 - 0.5).abs() <= abs(rounding) + 1e-5
    assert bool((in_band | (moved == 0)).all())


def test_a_shift_of_a_quarter_sends_three_quarters_down():
    groups = torch.tensor([[[0.74, 0.76, -0.74, -0.76, 1.74, 1.76]]])
    ones, zeros = torch.ones(1, 1), torch.full((1, 1), 4.0)
    codes = affine.nearest_codes(groups, ones, zeros, num_bits=3, rounding=0.25)
    assert (codes.float() - 4).flatten().tolist() == [0, 1, 0, -1, 1, 2]


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
@pytest.mark.parametrize("group_size", [7, 16, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounded_weight_is_what_rtn_stores(group_dim, group_size, symmetric):
    scheme = WeightScheme(
        num_bits=3, group_size=group_size, group_dim=group_dim, symmetric=symmetric
    )
    weight, method = normal(20, 40), load_method("rtn")
    stored = method.solve(problem(weight, scheme), method.options()).tensor
    assert torch.equal(affine.round_weight(weight, scheme), dequantized(stored))
