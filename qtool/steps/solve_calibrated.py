"""Quantize one layer for the inputs that it sees: shift it, solve it, choose by held-out error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution, Notice
from qtool.checkpoint.manifest import codec
from qtool.core.affine import round_weight
from qtool.core.metrics import squared
from qtool.core.moments import OutputErrors, added_error
from qtool.recipe.calibration import CalibrationSection
from qtool.scheme import WeightScheme
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.row_edges import row_parts
from qtool.steps.solve_rows import joined_rows, solve_rows
from qtool.walk.statistics import InputStatistics, raised

CLEARLY = 0.01
"""A method or grouping other than the first must save one percent of what rounding adds: kernels
like it."""


def solve_calibrated(
    layer: LayerPlan,
    weight: Tensor,
    statistics: Sequence[InputStatistics],
    section: CalibrationSection,
    env: Env,
) -> tuple[LayerPlan, LayerSolution]:
    """Quantize one linear of the blocks; warns if that is worse than rounding.

    Each group of rows is a problem of its own: shifted, solved and measured by its own moments.
    They share method and scheme, chosen by the sum of their errors. So is each of the parts that
    `calibration.part_rows` makes of a linear; their moments are the same.

    Args:
        layer: What to do with it.
        weight: (out_features, in_features) float32.
        statistics: Of its inputs, for each group of rows; they make up the weight in order.
        section: How calibration is used.
        env: Where it is computed.

    Returns:
        The plan with what was chosen, and its solution.
    """
    parts = row_parts(layer, section.part_rows)
    if len(parts) > 1:
        (whole,) = statistics  # the recipe has no groups then
        solved = [
            solve_part(layer, weight[rows], whole.of_rows(rows), section, env) for rows in parts
        ]
    else:
        solved = [solve_part(layer, weight[each.rows], each, section, env) for each in statistics]
    return joined_parts(layer, solved, env)


@dataclass(frozen=True, slots=True)
class SolvedPart:
    """Rows of a weight, solved in each way that the recipe lets qtool choose from."""

    solutions: tuple[LayerSolution, ...]
    errors: tuple[float, ...]
    """Of the output on held-out tokens, by solution."""
    added: tuple[float, ...]
    """What rounding adds to it, likewise."""
    rounded: tuple[tuple[float, float], ...]
    """Both of plain rounding to each one's scheme."""
    power: float
    """Of the output."""
    missed: tuple[float, ...]
    """Squared errors of the weight itself, as it was before it was shifted, by solution."""
    weight_power: float
    strength: float
    """Of the shift."""
    tokens_per_input: float


def solve_part(
    layer: LayerPlan,
    weight: Tensor,
    statistics: InputStatistics,
    section: CalibrationSection,
    env: Env,
) -> SolvedPart:
    """Quantize some rows of a linear, (rows, in_features) float32, for what they see."""
    asked = section.input_error
    target, used = statistics.shifted(weight, None if asked == "auto" else asked)
    measure, held_out = OutputErrors(statistics.held_out, weight), statistics.held_out
    tokens_per_input, alternatives = statistics.tokens_per_input, layer.alternatives()
    solutions = [_solved(one, target, statistics, env) for one in alternatives]
    candidates = [_dequantized(solution) for solution in solutions]
    rounded: dict[WeightScheme, tuple[float, float]] = {}
    for scheme in (one.scheme for one in alternatives):
        if scheme not in rounded:
            nearest = round_weight(weight, scheme)
            rounded[scheme] = measure.of(nearest), added_error(held_out, weight, nearest)
    return SolvedPart(
        solutions=tuple(solutions),
        errors=tuple(measure.of(each) for each in candidates),
        added=tuple(added_error(held_out, target, each) for each in candidates),
        rounded=tuple(rounded[one.scheme] for one in alternatives),
        power=measure.power,
        missed=tuple(squared(each - weight) for each in candidates),
        weight_power=squared(weight),
        strength=used,
        tokens_per_input=tokens_per_input,
    )


def joined_parts(
    layer: LayerPlan, parts: Sequence[SolvedPart], env: Env
) -> tuple[LayerPlan, LayerSolution]:
    """Choose for all parts of a layer together, in order; warns if that is worse than rounding."""
    alternatives = layer.alternatives()
    errors = [sum(each) for each in zip(*(part.errors for part in parts), strict=True)]
    added = [sum(each) for each in zip(*(part.added for part in parts), strict=True)]
    best = best_of(errors, clearly=CLEARLY * added[0])
    rounded, added_rounded = (sum(part.rounded[best][n] for part in parts) for n in (0, 1))
    power = sum(part.power for part in parts)
    if errors[best] > rounded:
        message = (
            f"{layer.name}: on held-out samples the solution is worse than rounding to nearest "
            f"({errors[best] / power:.2e}, not {rounded / power:.2e}). Use more samples, or text "
            "that is more like the model's."
        )
        env.emit(Notice(message))
    solution = joined_rows([part.solutions[best] for part in parts])
    missed = sum(part.missed[best] for part in parts)
    metrics = {
        **solution.metrics,
        "nmse": missed / (sum(part.weight_power for part in parts) or 1.0),
        "output_error": errors[best] / power,
        "output_error_rounded": rounded / power,
        "added_error": added[best] / power,
        "added_error_rounded": added_rounded / power,
        "input_error_strength": sum(part.strength for part in parts) / len(parts),
        "tokens_per_input": min(part.tokens_per_input for part in parts),
    }
    if len(errors) > 1:
        pairs = zip(_names(alternatives), errors, strict=True)
        metrics |= {f"output_error_{name}": error / power for name, error in pairs}
    return alternatives[best], replace(solution, metrics=metrics)


def _names(alternatives: Sequence[LayerPlan]) -> list[str]:
    """Name alternatives by what they differ in: group dimension, method, or both."""
    dims = [one.scheme.group_dim for one in alternatives]
    methods = [one.method for one in alternatives]
    if len(set(methods)) == 1:
        return list(dims)
    if len(set(dims)) == 1:
        return methods
    return [f"{method}_{dim}" for method, dim in zip(methods, dims, strict=True)]


def _solved(
    layer: LayerPlan, target: Tensor, statistics: InputStatistics, env: Env
) -> LayerSolution:
    """Solve with one of the schemes that the recipe lets qtool choose from."""
    method = load_method(layer.method)
    options = layer.options
    if hasattr(options, "damping"):
        options = replace(options, damping=raised(options.damping, statistics.tokens_per_input))
    wanted = method.needs | method.uses
    problem = LayerProblem(
        name=layer.name,
        weight=target,
        scheme=layer.scheme,
        statistics={"hessian": statistics.train.mean("xx")} if "hessian" in wanted else {},
        generator=torch.Generator(env.device).manual_seed(env.seed),
    )
    return solve_rows(method, problem, options, env)


def _dequantized(solution: LayerSolution) -> Tensor:
    return codec(solution.tensor.format).dequantize(solution.tensor, torch.float32)


def best_of(errors: Sequence[float], *, clearly: float) -> int:
    """Return the candidate with the smallest error; the first unless another saves `clearly`."""
    best = min(range(len(errors)), key=errors.__getitem__)
    return best if errors[0] - errors[best] > clearly else 0
