"""Options of the methods that the contract doesn't reach: bounds, variants, fallbacks."""

from dataclasses import replace

import pytest
import torch

from qtool.errors import RecipeError
from qtool.scheme import WeightScheme
from qtool.steps.method_choice import load_method, parse_options
from tests.helpers import dequantized, normal, problem, statistics

SCHEME = WeightScheme(num_bits=3, group_size=16)
WEIGHT = normal(20, 48)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("rtn", {"clip_ratio": 0.0}),
        ("rtn", {"clip_ratio": 1.1}),
        ("bcq", {"rounds": -1}),
        ("bcq", {"clip_ratios": [0.5, 0.0]}),
        ("bcq", {"clip_ratios": [], "greedy": False}),
        ("bcq", {"damping": 0.0}),
        ("bcq", {"start_powers": []}),
        ("bcq", {"iterations": 0}),
        ("gptq", {"damping": -1.0}),
        ("gptq", {"clip_candidates": 0}),
        ("gptq", {"column_block": 0}),
        ("gptq", {"order": "sideways"}),
        ("gptq", {"damping": 1.5}),
        ("bcq", {"damping": 1e-30}),
        ("bcq", {"damping": float("nan")}),
        ("bcq", {"damping": float("inf")}),
        ("bcq", {"rounds": 10**9}),
        ("bcq", {"rounds": 10**400}),
        ("bcq", {"iterations": 10**9}),
        ("bcq", {"start_powers": [float("nan")]}),
        ("bcq", {"start_powers": [-1.0]}),
        ("bcq", {"clip_ratios": [0.5] * 101}),
        ("gptq", {"polish_rounds": 10**9}),
        ("gptq", {"clip_candidates": 10**9}),
        ("gptq", {"column_block": 10**9}),
        ("rtn", {"clip_ratio": float("nan")}),
        ("rtn", {"clip_ratio": True}),
        ("bcq", {"rounds": True}),
        ("gptq", {"order": False}),
    ],
)
def test_option_outside_its_bounds_is_refused_by_name(method, values):
    with pytest.raises(RecipeError, match=min(values).removesuffix("s")):
        parse_options(method, load_method(method), values)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("rtn", {"clip_ratio": 1.0}),
        ("bcq", {"rounds": 0, "clip_ratios": []}),
        ("gptq", {"polish_rounds": 0, "clip_candidates": 1}),
    ],
)
def test_option_at_its_bound_is_taken(method, values):
    options = parse_options(method, load_method(method), values)
    for name, value in values.items():
        assert getattr(options, name) == (tuple(value) if isinstance(value, list) else value)


def loss(tensor) -> float:
    error = dequantized(tensor) - WEIGHT
    return float((error @ statistics(["hessian"], 48)["hessian"] * error).sum())


def solved(method_name, scheme=SCHEME, **options):
    method = load_method(method_name)
    given = problem(WEIGHT, scheme, method.needs | method.uses)
    return method.solve(given, method.options(**options)).tensor


@pytest.mark.parametrize("order", ["activation", "group", "natural"])
@pytest.mark.parametrize("group_dim", ["in_features", "out_features"])
def test_gptq_beats_rounding_in_every_order(order, group_dim):
    scheme = replace(SCHEME, group_dim=group_dim)
    assert loss(solved("gptq", scheme, order=order)) < 0.7 * loss(solved("rtn", scheme))


@pytest.mark.parametrize("block", [1, 7, 48, 1000])
def test_width_of_the_column_block_changes_nothing_but_speed(block):
    plain, other = (solved("gptq", column_block=width, polish_rounds=0) for width in (128, block))
    differing = (dequantized(plain) != dequantized(other)).double().mean()
    assert float(differing) < 0.01  # sums in another order: a tie may fall the other way


@pytest.mark.parametrize("method", ["gptq", "bcq"])
def test_polish_never_raises_the_loss(method):
    assert loss(solved(method)) <= loss(solved(method, polish_rounds=0)) * (1 + 1e-4)


@pytest.mark.parametrize("method_name", ["gptq", "bcq"])
def test_hessian_that_cannot_be_factored_falls_back_and_says_so(method_name):
    method = load_method(method_name)
    given = problem(WEIGHT, SCHEME)
    broken = torch.full((48, 48), float("nan"))
    given = replace(given, statistics={"hessian": broken})
    solution = method.solve(given, method.options())
    assert solution.fallback is not None
    assert "can't be factored" in solution.fallback
    error = dequantized(solution.tensor) - WEIGHT
    assert float(error.square().sum()) < 0.08 * float(WEIGHT.square().sum())


@pytest.mark.parametrize("method_name", ["gptq", "bcq"])
def test_solver_that_did_its_work_reports_no_fallback(method_name):
    method = load_method(method_name)
    given = problem(WEIGHT, SCHEME, ["hessian"])
    assert method.solve(given, method.options()).fallback is None


def test_identity_hessian_changes_nothing_for_bcq_without_polish():
    method = load_method("bcq")
    options = method.options(polish_rounds=0, iterations=30)
    plain = method.solve(problem(WEIGHT, SCHEME), options)
    given = replace(problem(WEIGHT, SCHEME), statistics={"hessian": torch.eye(48)})
    calibrated = method.solve(given, options)
    assert calibrated.metrics["nmse"] == pytest.approx(plain.metrics["nmse"], rel=0.02)
