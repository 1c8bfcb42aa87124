"""Quantize one layer for the inputs that it sees: shift it, solve it, choose by held-out error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution, Notice
from qtool.checkpoint.manifest import codec
from qtool.core.affine import round_weight
from qtool.core.moments import OutputErrors, added_error
from qtool.recipe.calibration import CalibrationSection
from qtool.steps.plan import LayerPlan, load_method
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
    They share method and scheme, chosen by the sum of their errors.

    Args:
        layer: What to do with it.
        weight: (out_features, in_features) float32.
        statistics: Of its inputs, for each group of rows; they make up the weight in order.
        section: How calibration is used.
        env: Where it is computed.

    Returns:
        The plan with what was chosen, and its solution.
    """
    asked = section.input_error
    strength = None if asked == "auto" else asked
    parts = [_Part.of(weight[each.rows], each, strength) for each in statistics]
    alternatives = layer.alternatives()
    solutions = [joined_rows([_solved(one, part, env) for part in parts]) for one in alternatives]
    candidates = [_dequantized(solution) for solution in solutions]
    errors = [sum(part.error(each) for part in parts) for each in candidates]
    added = [sum(part.added(each) for part in parts) for each in candidates]
    best = best_of(errors, clearly=CLEARLY * added[0])
    nearest = round_weight(weight, alternatives[best].scheme)
    rounded = sum(part.error(nearest) for part in parts)
    added_rounded = sum(part.added(nearest, shifted=False) for part in parts)
    power = sum(part.measure.power for part in parts)
    if errors[best] > rounded:
        message = (
            f"{layer.name}: on held-out samples the solution is worse than rounding to nearest "
            f"({errors[best] / power:.2e}, not {rounded / power:.2e}). Use more samples, or text "
            "that is more like the model's."
        )
        env.emit(Notice(message))
    metrics = {
        **solutions[best].metrics,
        "output_error": errors[best] / power,
        "output_error_rounded": rounded / power,
        "added_error": added[best] / power,
        "added_error_rounded": added_rounded / power,
        "input_error_strength": sum(part.strength for part in parts) / len(parts),
        "tokens_per_input": min(each.tokens_per_input for each in statistics),
    }
    if len(errors) > 1:
        pairs = zip(_names(alternatives), errors, strict=True)
        metrics |= {f"output_error_{name}": error / power for name, error in pairs}
    return alternatives[best], replace(solutions[best], metrics=metrics)


def _names(alternatives: Sequence[LayerPlan]) -> list[str]:
    """Name alternatives by what they differ in: group dimension, method, or both."""
    dims = [one.scheme.group_dim for one in alternatives]
    methods = [one.method for one in alternatives]
    if len(set(methods)) == 1:
        return list(dims)
    if len(set(dims)) == 1:
        return methods
    return [f"{method}_{dim}" for method, dim in zip(methods, dims, strict=True)]


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a weight that are solved as a problem of their own."""

    statistics: InputStatistics
    weight: Tensor  # (rows, in_features)
    target: Tensor  # the same, shifted
    strength: float
    measure: OutputErrors

    @staticmethod
    def of(weight: Tensor, statistics: InputStatistics, strength: float | None) -> "_Part":
        target, used = statistics.shifted(weight, strength)
        measure = OutputErrors(statistics.held_out, weight)
        return _Part(statistics, weight, target, used, measure)

    def error(self, quantized: Tensor) -> float:
        """Return what becomes of the output, of the whole weight's quantized one."""
        return self.measure.of(quantized[self.statistics.rows])

    def added(self, quantized: Tensor, *, shifted: bool = True) -> float:
        """Return what rounding adds to it."""
        meant = self.target if shifted else self.weight
        return added_error(self.statistics.held_out, meant, quantized[self.statistics.rows])


def _solved(layer: LayerPlan, part: _Part, env: Env) -> LayerSolution:
    """Solve with one of the schemes that the recipe lets qtool choose from."""
    method, statistics = load_method(layer.method), part.statistics
    options = layer.options
    if hasattr(options, "damping"):
        options = replace(options, damping=raised(options.damping, statistics.tokens_per_input))
    wanted = method.needs | method.uses
    problem = LayerProblem(
        name=layer.name,
        weight=part.target,
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
