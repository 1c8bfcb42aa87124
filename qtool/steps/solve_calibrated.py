"""Quantize one layer for the inputs that it sees: shift it, solve it, choose by held-out error."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution, Notice
from qtool.checkpoint.manifest import codec
from qtool.core.moments import OutputErrors, added_error
from qtool.recipe.schema import CalibrationSection
from qtool.steps.plan import LayerPlan, load_method
from qtool.walk.statistics import InputStatistics, raised

CLEARLY = 0.01
"""A grouping other than the first must save one percent of what rounding adds: kernels like it."""


def solve_calibrated(
    layer: LayerPlan,
    weight: Tensor,
    statistics: InputStatistics,
    section: CalibrationSection,
    env: Env,
) -> LayerSolution:
    """Quantize one linear of the blocks; warns if that is worse than rounding.

    Args:
        layer: What to do with it.
        weight: (out_features, in_features) float32.
        statistics: Of its inputs.
        section: How calibration is used.
        env: Where it is computed.
    """
    asked = section.input_error
    target, strength = statistics.shifter.shift(weight, None if asked == "auto" else asked)
    alternatives = layer.alternatives()
    candidates = [_candidate(one, target, statistics, env) for one in alternatives]
    held_out = statistics.held_out
    measure = OutputErrors(held_out, weight)
    errors = [measure.of(quantized) for _, quantized in candidates]
    added = [added_error(held_out, target, quantized) for _, quantized in candidates]
    best = choose(errors, clearly=CLEARLY * added[0])
    nearest = round_to_nearest(alternatives[best], weight)
    rounded = measure.of(nearest)
    relative, rounded_relative = errors[best] / measure.power, rounded / measure.power
    if errors[best] > rounded:
        message = (
            f"{layer.name}: on held-out samples the solution is worse than rounding to nearest "
            f"({relative:.2e}, not {rounded_relative:.2e}). Use more samples, or text that is more "
            "like the model's."
        )
        env.emit(Notice(message))
    solution, _ = candidates[best]
    metrics = {
        **solution.metrics,
        "output_error": relative,
        "output_error_rounded": rounded_relative,
        "added_error": added[best] / measure.power,
        "added_error_rounded": added_error(held_out, weight, nearest) / measure.power,
        "input_error_strength": strength,
        "tokens_per_input": statistics.tokens_per_input,
    }
    if len(errors) > 1:
        pairs = zip(alternatives, errors, strict=True)
        metrics |= {f"output_error_{one.scheme.group_dim}": e / measure.power for one, e in pairs}
    return replace(solution, metrics=metrics)


def _candidate(
    layer: LayerPlan, target: Tensor, statistics: InputStatistics, env: Env
) -> tuple[LayerSolution, Tensor]:
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
    solution = method.solve(problem, options)
    return solution, codec(solution.tensor.format).dequantize(solution.tensor, torch.float32)


def round_to_nearest(layer: LayerPlan, weight: Tensor) -> Tensor:
    """Return the weight as `rtn` would leave it with this scheme: what a solver has to beat."""
    rtn = load_method("rtn")
    problem = LayerProblem(name=layer.name, weight=weight, scheme=layer.scheme)
    tensor = rtn.solve(problem, rtn.options()).tensor
    return codec(tensor.format).dequantize(tensor, torch.float32)


def choose(errors: Sequence[float], *, clearly: float) -> int:
    """Return the candidate with the smallest error; the first unless another saves `clearly`."""
    best = min(range(len(errors)), key=errors.__getitem__)
    return best if errors[0] - errors[best] > clearly else 0
