"""What the three folds have in common, and where they part."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.folds import load_fold
from qtool.folds._powers import best_of_candidates, output_errors
from qtool.folds.aqas import AqasOptions, closed_form, search_aqas
from qtool.folds.awq import AwqOptions, search_awq
from qtool.folds.smoothquant import SmoothQuantOptions, smooth
from tests.unit.folds.problems import fold_problem

SEEDS = st.integers(0, 1000)
GRANULARITIES = [None, "token", "tensor"]


def error(problem, factors) -> float:
    return next(output_errors(problem, [factors], with_inputs=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=10)
@given(seed=SEEDS)
def test_aqas_is_never_worse_than_the_identity(granularity, seed):
    problem = fold_problem(granularity=granularity, seed=seed)
    solution = search_aqas(problem, AqasOptions(exponents=5))
    found = error(problem, solution.factors)
    assert found == solution.metrics["error"]
    assert found <= error(problem, torch.ones(32))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@settings(max_examples=10)
@given(seed=SEEDS)
def test_aqas_is_at_least_as_good_as_awq_where_both_round(granularity, seed):
    """AWQ's candidates are among its own, and it measures what counts."""
    problem = fold_problem(granularity=granularity, seed=seed)
    options = {"exponents": 5}
    joint = search_aqas(problem, AqasOptions(**options)).factors
    alone = search_awq(problem, AwqOptions(**options)).factors
    assert error(problem, joint) <= error(problem, alone)


def test_with_inputs_as_they_are_the_search_is_that_of_awq():
    from qtool.folds import awq

    problem = fold_problem(granularity=None)
    candidates = list(awq._candidates(problem, AwqOptions()))
    joint = best_of_candidates(problem, candidates, with_inputs=True)
    assert torch.equal(joint.factors, search_awq(problem, AwqOptions()).factors)


def test_awq_does_not_look_at_how_inputs_are_rounded():
    first, second = (
        search_awq(fold_problem(granularity=one), AwqOptions()).factors for one in ("tensor", None)
    )
    assert torch.equal(first, second)


def test_smoothquant_is_its_formula():
    problem = fold_problem()
    largest, weights = problem.largest, torch.cat(problem.weights).abs().amax(0)
    expected = largest**0.7 / weights**0.3
    expected /= (expected.max() * expected.min()).sqrt()
    found = smooth(problem, SmoothQuantOptions(alpha=0.7)).factors
    torch.testing.assert_close(found, expected)


def test_closed_form_is_the_minimum_where_steps_do_not_depend_on_the_factors():
    """Noise of constant size on scaled weights and scaled inputs."""
    problem = fold_problem()
    weights = torch.cat(problem.weights)
    x, w = problem.inputs.square().sum(0).double(), weights.square().sum(0).double()

    def expected_error(factors):
        ratio = w.sum() / x.sum()  # of the steps' squares; only the shape of factors counts
        scale = ((ratio * w * factors**2).sum() / (x / factors**2).sum()) ** 0.25
        s = factors / scale.sqrt()
        return float((x / s**2).sum() * (w * s**2).sum())

    best = closed_form(problem).factors.double()
    least = expected_error(best)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best * torch.exp(0.1 * torch.randn(32, generator=generator))
        assert expected_error(other) >= least


@pytest.mark.parametrize("name", ["aqas", "smoothquant"])
def test_loud_channels_are_shared_with_the_weights_where_one_step_serves_all(name):
    problem = fold_problem(granularity="tensor")
    fold = load_fold(name)
    factors = fold.search(problem, fold.options()).factors
    others = torch.ones(32, dtype=torch.bool)
    others[[3, 19]] = False
    assert float(factors[[3, 19]].min()) > 2 * float(factors[others].max())
    assert error(problem, factors) < 0.5 * error(problem, torch.ones(32))


def test_error_is_that_of_the_outputs_of_all_linears():
    problem = fold_problem(granularity=None)
    exact = replace(problem, round_weight=lambda _, weight: weight)
    factors = 1 + torch.rand(32, generator=torch.Generator().manual_seed(0))
    assert error(exact, factors) < 1e-8
    off = replace(problem, round_weight=lambda which, weight: weight + (which + 1) * factors)
    # each output is off by the sum of its inputs, once or twice
    sums = problem.inputs.sum(1).double().square().mean()
    assert error(off, factors) == pytest.approx(5 * float(sums), rel=1e-4)
