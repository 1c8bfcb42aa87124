from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import alternating
from qtool.core.alternating import FitOptions
from qtool.core.binary_coding import levels, signs
from tests.helpers import normal

seeds = st.integers(0, 10_000)
CPU = torch.device("cpu")
# Relative squared error on N(0, 1) in groups of 128, all four starts: by number of planes.
GAUSSIAN = {1: 0.353, 2: 0.1083, 3: 0.0304, 4: 0.0079}


def ones(groups: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, groups.shape[-1])


def exact_error(groups, importance, scales, offsets):
    """Return the weighted squared error of each group with every weight at its nearest level."""
    grid = levels(scales.double(), offsets.double())
    distance = (groups.double().unsqueeze(-1) - grid.unsqueeze(1)) ** 2
    return (importance.double() * distance.amin(-1)).sum(-1)


def naive(weights, importance, theta, *, offset, rounds):
    """Alternate by the book for one group in numpy: nearest levels, then least squares."""
    num_bits = len(theta) - 1
    table = signs(num_bits, device=CPU, dtype=torch.float64).numpy()
    best = np.inf
    for _ in range(rounds + 1):
        values = theta[-1] + table @ theta[:-1]
        order = np.argsort(values, kind="stable")
        middles = ((values[order][1:] + values[order][:-1]) / 2).astype(np.float32)
        codes = order[np.searchsorted(middles, weights, side="right")]
        best = min(best, float((importance * (weights - values[codes]) ** 2).sum()))
        design = np.column_stack([table[codes], np.ones(len(weights))])
        design = design if offset else design[:, :-1]
        root = np.sqrt(importance)
        solved = np.linalg.lstsq(root[:, None] * design, root * weights, rcond=1e-9)[0]
        theta = solved if offset else np.append(solved, 0.0)
    return best


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_prefix_sums_give_the_errors_of_the_plain_method(num_bits, offset):
    groups = normal(24, 96, seed=num_bits)
    importance = normal(24, 96, seed=99).abs() + 0.01
    start = alternating.greedy_start(groups, importance, num_bits, offset=offset)
    data = alternating.sort_groups(groups, importance)
    for rounds in (0, 1, 2, 5):
        _, error = alternating.alternate(data, start, offset=offset, rounds=rounds)
        expected = [
            naive(w, d, theta, offset=offset, rounds=rounds)
            for w, d, theta in zip(
                groups.double().numpy(), importance.double().numpy(), start.numpy(), strict=True
            )
        ]
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(error, wanted, rtol=1e-5, atol=1e-9)


@given(num_bits=st.integers(1, 5), offset=st.booleans(), size=st.integers(1, 70), seed=seeds)
def test_reported_error_is_the_true_error_of_the_solution(num_bits, offset, size, seed):
    groups = normal(6, size, seed=seed)
    options = FitOptions(num_bits=num_bits, offset=offset, rounds=5)
    scales, offsets, error = alternating.fit(groups, ones(groups), options)
    truth = exact_error(groups, ones(groups), scales, offsets)
    torch.testing.assert_close(error, truth, rtol=1e-4, atol=1e-5 * size)
    if not offset:
        assert not bool(offsets.any())


@given(num_bits=st.integers(1, 4), offset=st.booleans(), seed=seeds)
def test_more_rounds_never_raise_the_error(num_bits, offset, seed):
    groups = normal(8, 40, seed=seed)
    errors = [
        alternating.fit(
            groups, ones(groups), FitOptions(num_bits=num_bits, offset=offset, rounds=rounds)
        )[2]
        for rounds in (0, 1, 2, 3, 8, 30)
    ]
    for fewer, more in pairwise(errors):
        assert bool((more <= fewer * (1 + 1e-6) + 1e-12).all())


@given(num_bits=st.integers(1, 5), rounds=st.integers(0, 6), offset=st.booleans(), seed=seeds)
def test_result_is_never_worse_than_its_start(num_bits, rounds, offset, seed):
    groups = normal(6, 33, seed=seed)
    start = normal(6, num_bits + 1, seed=seed + 1).double()
    if not offset:
        start[:, -1] = 0
    data = alternating.sort_groups(groups, ones(groups))
    theta, error = alternating.alternate(data, start, offset=offset, rounds=rounds)
    before = exact_error(groups, ones(groups), start[:, :-1], start[:, -1])
    after = exact_error(groups, ones(groups), theta[:, :-1], theta[:, -1])
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all())
    torch.testing.assert_close(error, after, rtol=1e-4, atol=1e-6)


@given(num_bits=st.integers(1, 4), seed=seeds)
def test_one_more_plane_is_never_worse(num_bits, seed):
    groups = normal(6, 48, seed=seed)
    data = alternating.sort_groups(groups, ones(groups))
    options = FitOptions(num_bits=num_bits)
    scales, offsets, error = alternating.fit(groups, ones(groups), options)
    nearest = levels(scales, offsets).unsqueeze(1) - groups.double().unsqueeze(-1)
    residual = nearest.abs().amin(-1).mean(-1, keepdim=True)
    start = torch.cat([scales, residual, offsets.unsqueeze(-1)], -1)
    _, better = alternating.alternate(data, start, offset=True, rounds=3)
    assert bool((better < error).all())  # strictly: a continuous residual is never zero


@given(num_bits=st.integers(1, 4), seed=seeds)
def test_smaller_groups_started_from_the_larger_are_never_worse(num_bits, seed):
    groups = normal(5, 64, seed=seed)
    whole = FitOptions(num_bits=num_bits)
    scales, offsets, error = alternating.fit(groups, ones(groups), whole)
    start = torch.cat([scales, offsets.unsqueeze(-1)], -1).repeat_interleave(4, 0)
    parts = groups.reshape(20, 16)
    data = alternating.sort_groups(parts, ones(parts))
    _, part_errors = alternating.alternate(data, start, offset=True, rounds=5)
    assert bool((part_errors.view(5, 4).sum(-1) <= error * (1 + 1e-5)).all())


@pytest.mark.parametrize("num_bits", GAUSSIAN)
def test_error_on_gaussian_weights_is_the_published_one(num_bits):
    groups = normal(400, 128, seed=3)
    _, _, error = alternating.fit(groups, ones(groups), FitOptions(num_bits=num_bits))
    relative = float(error.sum() / (groups.double() ** 2).sum())
    assert relative == pytest.approx(GAUSSIAN[num_bits], rel=0.03)


@pytest.mark.parametrize("factor", [2.0**-20, 0.125, 2.0, 2.0**15])
@pytest.mark.parametrize("offset", [True, False])
def test_scaling_the_weights_by_a_power_of_two_scales_the_solution_exactly(factor, offset):
    groups, options = normal(50, 64), FitOptions(num_bits=3, offset=offset)
    plain = alternating.fit(groups, ones(groups), options)
    scaled = alternating.fit(groups * factor, ones(groups), options)
    assert torch.equal(plain[0] * factor, scaled[0])
    assert torch.equal(plain[1] * factor, scaled[1])


@pytest.mark.parametrize("factor", [1e-30, 0.3, 7.7, 1e30])
def test_scaling_the_weights_scales_the_error(factor):
    groups, options = normal(200, 64), FitOptions(num_bits=3)
    plain = alternating.fit(groups, ones(groups), options)[2].sum()
    scaled = alternating.fit(groups * factor, ones(groups), options)[2].sum()
    assert float(scaled / factor**2) == pytest.approx(float(plain), rel=1e-3)


@pytest.mark.parametrize("shift", [-3.0, 0.25, 10.0])
def test_shifting_the_weights_shifts_only_the_offset(shift):
    groups, options = normal(200, 64), FitOptions(num_bits=3)
    plain = alternating.fit(groups, ones(groups), options)
    shifted = alternating.fit(groups + shift, ones(groups), options)
    assert float(shifted[2].sum()) == pytest.approx(float(plain[2].sum()), rel=3e-3)
    # Rounding of the shifted weights may send a group to another optimum, but hardly any.
    moved = (shifted[1] - plain[1] - shift).abs() > 1e-4
    assert float(moved.double().mean()) < 0.05


@pytest.mark.parametrize("num_bits", [1, 2, 3])
def test_without_offset_negated_weights_have_the_same_error(num_bits):
    groups, options = normal(100, 64), FitOptions(num_bits=num_bits, offset=False)
    plain, negated = (alternating.fit(g, ones(g), options)[2] for g in (groups, -groups))
    torch.testing.assert_close(plain, negated, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.5, -3.0, 1e-20, 6e4])
@pytest.mark.parametrize("num_bits", [1, 3, 8])
def test_constant_groups_have_no_error(constant, num_bits):
    groups = torch.full((3, 20), constant)
    scales, offsets, _ = alternating.fit(groups, ones(groups), FitOptions(num_bits=num_bits))
    error = exact_error(groups, ones(groups), scales, offsets)
    assert float(error.max()) <= 1e-12 * constant**2


@pytest.mark.parametrize("num_bits", [1, 2, 4])
def test_padding_has_no_influence(num_bits):
    short = normal(10, 20) + 3.0  # far from the zeros of the padding
    padded = torch.nn.functional.pad(short, (0, 12))
    real = torch.nn.functional.pad(torch.ones(1, 20), (0, 12))
    options = FitOptions(num_bits=num_bits)
    expected = alternating.fit(short, ones(short), options)
    for got, want in zip(alternating.fit(padded, real, options), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_group_without_any_real_weight_stays_finite():
    for part in alternating.fit(torch.zeros(2, 8), torch.zeros(1, 8), FitOptions(num_bits=3)):
        assert bool(torch.isfinite(part).all())


def test_chunking_does_not_change_the_solution(monkeypatch):
    groups, options = normal(37, 16), FitOptions(num_bits=2)
    whole = alternating.fit(groups, ones(groups), options)
    monkeypatch.setattr(alternating, "CHUNK_ELEMENTS", 16 * 5)
    for part, expected in zip(alternating.fit(groups, ones(groups), options), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_important_weights_get_the_smaller_error():
    groups = normal(50, 64)
    importance = torch.ones(64)
    importance[:8] = 100.0
    options = FitOptions(num_bits=2)

    def error_of_first_eight(weights: torch.Tensor) -> float:
        scales, offsets, _ = alternating.fit(groups, weights.expand_as(groups), options)
        return float(exact_error(groups[:, :8], torch.ones(1, 8), scales, offsets).sum())

    assert error_of_first_eight(importance) < 0.5 * error_of_first_eight(torch.ones(64))


def test_greedy_start_sends_zero_residuals_up():
    start = alternating.greedy_start(torch.zeros(1, 4), torch.ones(1, 4), 2, offset=False)
    assert not bool(start.any())
    # +1 and -1 leave residuals of exactly zero after the first plane.
    start = alternating.greedy_start(torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), 2, offset=False)
    assert start.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("together", [2, 4])
def test_starts_solved_together_equal_starts_solved_one_by_one(together):
    generator = torch.Generator().manual_seed(7)
    groups = torch.randn(50, 64, generator=generator)
    options = alternating.FitOptions(num_bits=3)
    data = alternating.sort_groups(groups, torch.ones(1))
    low, high = groups.amin(-1).double(), groups.amax(-1).double()
    starts = [alternating.uniform_start(low, high, 3, ratio) for ratio in (1.0, 0.85, 0.7)]
    starts.append(alternating.greedy_start(groups, torch.ones(1).expand_as(groups), 3, offset=True))
    one_by_one = alternating.solve_starts(data, starts, options, together=1)
    at_once = alternating.solve_starts(data, starts, options, together=together)
    torch.testing.assert_close(at_once, one_by_one)
