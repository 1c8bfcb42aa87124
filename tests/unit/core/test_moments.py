"""Errors and shifted targets from second moments, against the tokens themselves in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core import hessian, moments
from tests.helpers import normal

TOKENS, INPUTS, OUTPUTS = 300, 12, 5


def tokens(seed: int = 0, count: int = TOKENS):
    """Return inputs x of the quantized model, drift and residual drift, correlated with x."""
    x = normal(count, INPUTS, seed=seed) @ normal(INPUTS, INPUTS, seed=99)
    drift = 0.2 * x @ normal(INPUTS, INPUTS, seed=98) + 0.1 * normal(count, INPUTS, seed=seed + 1)
    residual = 0.3 * x @ normal(INPUTS, OUTPUTS, seed=97) + normal(count, OUTPUTS, seed=seed + 2)
    return x, drift, residual


def summed(x, drift, residual, *, for_errors=True):
    width = None if residual is None else OUTPUTS
    total = moments.no_moments(INPUTS, width, device=x.device, for_errors=for_errors)
    for start in range(0, len(x), 64):
        batch = slice(start, start + 64)
        total.add(x[batch], drift[batch], None if residual is None else residual[batch])
    return total


def exact(x, drift, residual, weight, quantized):
    """Return the error and the power by their definition."""
    x, drift, weight, quantized = (t.double() for t in (x, drift, weight, quantized))
    output = (x + drift) @ weight.T
    error = output - x @ quantized.T
    if residual is not None:
        error = error + residual.double()
    return float(error.square().sum(1).mean()), float(output.square().sum(1).mean())


@pytest.mark.parametrize("with_residual", [False, True])
@given(seed=st.integers(0, 50), scale=st.sampled_from([1e-3, 0.1, 1.0]))
def test_output_error_is_that_of_the_tokens(with_residual, seed, scale):
    x, drift, residual = tokens(seed)
    residual = residual if with_residual else None
    weight = normal(OUTPUTS, INPUTS, seed=seed + 3)
    quantized = weight + scale * normal(OUTPUTS, INPUTS, seed=seed + 4)
    measure = moments.OutputErrors(summed(x, drift, residual), weight)
    error, power = exact(x, drift, residual, weight, quantized)
    assert measure.of(quantized) == pytest.approx(error, rel=1e-3)
    assert measure.power == pytest.approx(power, rel=1e-3)


def test_added_error_is_that_of_rounding_alone():
    x, drift, residual = tokens()
    weight = normal(OUTPUTS, INPUTS, seed=3)
    quantized = weight + 0.1 * normal(OUTPUTS, INPUTS, seed=4)
    expected = (x @ (weight - quantized).T).square().sum(1).mean()
    means = summed(x, drift, residual)
    assert moments.added_error(means, weight, quantized) == pytest.approx(float(expected), rel=1e-4)
    assert moments.added_error(means, weight, weight) == 0


def shifter(train, held_out, damping=1e-7):
    lower = hessian.cholesky(hessian.damp(train.mean("xx"), damping))
    return moments.Shifter(train, held_out, lower)


@pytest.mark.parametrize("with_residual", [False, True])
def test_shifted_problem_differs_from_the_true_one_by_a_constant(with_residual):
    """QEP's identity: any solver that minimizes tr((W' - Q) H (W' - Q)^T) solves the true one."""
    x, drift, residual = tokens()
    residual = residual if with_residual else None
    means = summed(x, drift, residual)
    weight = normal(OUTPUTS, INPUTS, seed=3)
    target, strength = shifter(means, means).shift(weight, 1.0)
    assert strength == 1.0
    gaps = []
    for seed in range(4):
        quantized = weight + normal(OUTPUTS, INPUTS, seed=20 + seed)
        change = (target - quantized).double()
        gaps.append(
            exact(x, drift, residual, weight, quantized)[0]
            - float(((change @ means.mean("xx").double()) * change).sum())
        )
    assert max(gaps) - min(gaps) < 1e-3 * max(map(abs, gaps))


@pytest.mark.parametrize("with_residual", [False, True])
def test_chosen_strength_is_the_best_on_held_out_tokens(with_residual):
    x, drift, residual = tokens(count=40)  # few: the full shift overfits
    other = tokens(seed=7)
    pick = (lambda r: r) if with_residual else (lambda _: None)
    train = summed(x, drift, pick(residual))
    held_out = summed(other[0], other[1], pick(other[2]))
    weight = normal(OUTPUTS, INPUTS, seed=3)
    target, strength = shifter(train, held_out).shift(weight, None)
    assert 0 < strength <= 1
    measure = moments.OutputErrors(held_out, weight)
    chosen = measure.of(target)
    for fixed in (0.0, 0.5 * strength, min(1.0, 1.5 * strength), 1.0):
        other_target, _ = shifter(train, held_out).shift(weight, fixed)
        assert chosen <= measure.of(other_target) * (1 + 1e-5)


def test_shift_that_hurts_on_held_out_tokens_is_left_out():
    x, drift, residual = tokens()
    train = summed(x, drift, residual)
    opposite = summed(x, -drift, -residual)
    weight = normal(OUTPUTS, INPUTS, seed=3)
    target, strength = shifter(train, opposite).shift(weight, None)
    assert strength == 0
    assert torch.equal(target, weight)


def test_nothing_is_shifted_without_drift_or_without_a_factor():
    x, drift, _ = tokens()
    weight = normal(OUTPUTS, INPUTS, seed=3)
    still = summed(x, torch.zeros_like(drift), None)
    assert torch.equal(shifter(still, still).shift(weight, None)[0], weight)
    moved = summed(x, drift, None)
    assert torch.equal(moments.Shifter(moved, moved, None).shift(weight, 1.0)[0], weight)
    assert torch.equal(shifter(moved, moved).shift(weight, 0.0)[0], weight)


@pytest.mark.parametrize("with_residual", [False, True])
def test_moments_of_two_shards_add_up_to_those_of_all_tokens(with_residual):
    x, drift, residual = tokens()
    shards = [slice(0, 100), slice(100, TOKENS)]
    first, second = (
        summed(x[part], drift[part], residual[part] if with_residual else None) for part in shards
    )
    whole, merged = summed(x, drift, residual if with_residual else None), first.merged(second)
    assert (first.num_tokens, merged.num_tokens) == (100, TOKENS)
    assert merged.sums.keys() == whole.sums.keys()
    for product in whole.sums:
        torch.testing.assert_close(merged.mean(product), whole.mean(product), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_parts_are_added_in_float64_and_rounded_once(counts):
    parts = [summed(*tokens(seed, count)) for seed, count in enumerate(counts)]
    total = moments.OrderedTotal()
    for part in parts:
        total.add(moments.Moments(dict(part.sums), part.num_tokens))
    found = total.moments()
    assert found.num_tokens == sum(counts)
    for product, values in found.sums.items():
        assert torch.equal(values, sum(part.sums[product].double() for part in parts).float())


@given(seed=st.integers(0, 20), cut=st.integers(1, OUTPUTS - 1))
def test_errors_of_parts_of_the_rows_add_up(seed, cut):
    total, weight = summed(*tokens(seed)), normal(OUTPUTS, INPUTS, seed=7)
    quantized = weight + 0.1 * normal(OUTPUTS, INPUTS, seed=8)
    parts = [
        moments.OutputErrors(total.of_rows(rows), weight[rows]).of(quantized[rows])
        for rows in (slice(0, cut), slice(cut, OUTPUTS))
    ]
    assert sum(parts) == pytest.approx(moments.OutputErrors(total, weight).of(quantized), rel=1e-4)
