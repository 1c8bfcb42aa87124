"""What every fold must do: found by file name, so a new one is tested without an edit here."""

from dataclasses import MISSING, fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import RecipeError
from qtool.folds import FoldProblem, fold_names, load_fold
from qtool.recipe.folding import FoldSection
from qtool.steps.check_fold import fold_options
from tests.unit.folds.problems import fold_problem

FOLDS = fold_names()


@pytest.fixture(params=FOLDS)
def fold(request):
    return load_fold(request.param)


def solved(fold, problem: FoldProblem):
    return fold.search(problem, fold.options())


def check_sane(factors, problem: FoldProblem):
    assert factors.shape == problem.mean.shape
    assert factors.dtype == torch.float32
    assert bool((torch.isfinite(factors) & (factors > 0)).all())


@pytest.mark.parametrize("granularity", ["token", "tensor", None])
def test_factors_are_finite_and_above_zero(fold, granularity):
    problem = fold_problem(granularity=granularity)
    check_sane(solved(fold, problem).factors, problem)


def test_inputs_of_one_channel_have_one_factor(fold):
    channel = torch.arange(32) % 8
    factors = solved(fold, fold_problem(channel=channel)).factors
    assert torch.equal(factors, factors[:8][channel])


@pytest.mark.parametrize("silent", [0.0, 1e-30])
def test_silent_channels_and_columns_of_zeros_do_no_harm(fold, silent):
    problem = fold_problem()
    quiet = torch.ones(32)
    quiet[[0, 7]] = silent
    weights = tuple(weight * quiet.flip(0) for weight in problem.weights)
    problem = replace(
        problem,
        inputs=problem.inputs * quiet,
        mean=problem.mean * quiet,
        largest=problem.largest * quiet,
        weights=weights,
    )
    check_sane(solved(fold, problem).factors, problem)


def test_all_inputs_zero(fold):
    problem = fold_problem()
    nothing = torch.zeros(32)
    problem = replace(problem, inputs=0 * problem.inputs, mean=nothing, largest=nothing)
    check_sane(solved(fold, problem).factors, problem)


@pytest.mark.parametrize("name", FOLDS)
@settings(max_examples=10)
@given(exponent=st.integers(-8, 8))
def test_a_constant_factor_of_all_inputs_changes_nothing_per_token(name, exponent):
    fold, problem, times = load_fold(name), fold_problem(granularity="token"), 2.0**exponent
    louder = replace(
        problem,
        inputs=times * problem.inputs,
        mean=times * problem.mean,
        largest=times * problem.largest,
    )
    expected = solved(fold, problem).factors
    torch.testing.assert_close(solved(fold, louder).factors, expected, rtol=1e-4, atol=0)


def test_metrics_are_finite_numbers(fold):
    metrics = solved(fold, fold_problem()).metrics
    assert {"error", "error_unfolded"} <= set(metrics)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


def test_options_are_frozen_keyword_only_and_have_defaults(fold):
    assert is_dataclass(fold.options)
    assert vars(fold.options)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in fields(fold.options))
    for field in fields(fold.options):
        assert field.default is not MISSING or field.default_factory is not MISSING


def test_summary_is_one_sentence(fold):
    assert fold.summary.endswith(".")
    assert "\n" not in fold.summary


@pytest.mark.parametrize("name", FOLDS)
def test_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(RecipeError, match=r"No 'no_such_option' in fold\.options"):
        fold_options(FoldSection(name=name, options={"no_such_option": 1}))


@pytest.mark.parametrize("name", FOLDS)
def test_option_of_the_wrong_type_is_refused_in_one_line(name):
    for field in fields(load_fold(name).options):
        with pytest.raises(RecipeError, match=field.name) as caught:
            fold_options(FoldSection(name=name, options={field.name: {"not": "a value"}}))
        assert "\n" not in str(caught.value)
