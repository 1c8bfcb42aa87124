"""Solve one layer of a plan: read it, choose what it is solved for, check what comes out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import LayerSolution, Notice, QuantizedTensor
from qtool.checkpoint.spool import Made
from qtool.core.experts import expert_name
from qtool.errors import MethodError, about
from qtool.scheme import ActivationScheme, InputScheme
from qtool.steps.plan import LayerPlan
from qtool.steps.run import Run
from qtool.steps.solve_calibrated import SolvedPart, joined_parts, solve_calibrated, solve_part
from qtool.steps.solve_expert import solve_expert
from qtool.steps.solve_table import solve_alone
from qtool.walk.statistics import InputStatistics
from qtool.walk.walk import Walk

ROUGH = 2.0**-20
"""Below it the steps between float16 numbers are more than 6 % of the number."""
HUGE = 0.1 * torch.finfo(torch.float16).max
"""A weight so large may leave float16 by itself; a smaller one has to be shifted far."""


def solved_layer(
    run: Run, layer: LayerPlan, walk: Walk | None, under: Callable[[LayerPlan], Tensor | None]
) -> Made:
    """Solve one layer, with the statistics that the walk gives; a table under a Hessian.

    Args:
        run: Which model, and where it is computed.
        layer: What to do with it.
        walk: Where it stands; None: there are no samples.
        under: Gives the Hessian of a table, if there is one.

    Raises:
        MethodError: a weight or an input isn't finite, or a method refused the layer, or with
            `calibration.strict` did something simpler.
    """
    if walk is not None and expert_name(layer.name) is not None:
        return _solved_expert(run, layer, walk)
    statistics = None if walk is None else walk.statistics(layer.name)
    return solved_for(run, layer, statistics, under)


def solved_for(
    run: Run,
    layer: LayerPlan,
    statistics: Sequence[InputStatistics] | None,
    under: Callable[[LayerPlan], Tensor | None],
) -> Made:
    """Solve one layer with statistics of its inputs; None: it has none. Otherwise as above."""
    section, env = run.recipe.calibration, run.env
    started = time.perf_counter()
    with about(layer=layer.name):
        weight = run.source.read_weight(layer.name).to(env.device)
        _check_finite(layer.name, weight)
        if statistics is None or section is None:
            chosen, solution = layer, solve_alone(layer, weight, env, under(layer))
        else:
            chosen, solution = solve_calibrated(layer, weight, statistics, section, env)
    activation = layer.activation if statistics is None else statistics[0].activation
    return _made(run, time.perf_counter() - started, chosen, solution, activation)


def part_for(
    run: Run, layer: LayerPlan, rows: slice, statistics: Sequence[InputStatistics]
) -> tuple[SolvedPart, float]:
    """Solve some rows of a layer, and return how many seconds that took. Otherwise as above."""
    section, started = run.recipe.calibration, time.perf_counter()
    assert section is not None
    (whole,) = statistics
    with about(layer=layer.name):
        weight = run.source.read_weight(layer.name)[rows].to(run.env.device)
        _check_finite(layer.name, weight)
        part = solve_part(layer, weight, whole.of_rows(rows), section, run.env)
    return part, time.perf_counter() - started


def joined_for(
    run: Run,
    layer: LayerPlan,
    parts: Sequence[tuple[SolvedPart, float]],
    activation: InputScheme,
) -> Made:
    """Return what a layer becomes of whose rows all parts are solved, in order."""
    with about(layer=layer.name):
        chosen, solution = joined_parts(layer, [part for part, _ in parts], run.env)
    return _made(run, sum(seconds for _, seconds in parts), chosen, solution, activation)


def _solved_expert(run: Run, layer: LayerPlan, walk: Walk) -> Made:
    """Solve a layer of one expert, and note for which tokens."""
    section, statistics = run.recipe.calibration, walk.expert_statistics(layer.name)
    assert section is not None
    started = time.perf_counter()
    with about(layer=layer.name):
        weight = run.source.read_weight(layer.name).to(run.env.device)
        _check_finite(layer.name, weight)
        chosen, solution, tokens_from = solve_expert(layer, weight, statistics, section, run.env)
    seconds = time.perf_counter() - started
    made = _made(run, seconds, chosen, solution, statistics.activation)
    if tokens_from == "routed":
        return made
    return replace(made, notes={**made.notes, "tokens_from": tokens_from})


def _made(
    run: Run,
    seconds: float,
    layer: LayerPlan,
    solution: LayerSolution,
    activation: InputScheme,
) -> Made:
    """Check a solution, and note what a resumed run and the report want to know of it."""
    tensor = solution.tensor
    with about(layer=layer.name):
        _check_stored(run, layer.name, tensor)
        check_fallback(run, layer.name, solution.fallback)
    notes = {
        "format": tensor.format,
        "scheme": tensor.scheme.to_json(),
        "metrics": dict(solution.metrics),
        "fallback": solution.fallback,
        "seconds": seconds,
        "method": layer.method,
    }
    if isinstance(activation, ActivationScheme):
        notes["activation"] = activation.to_json()
    return Made(tensor, notes)


def check_fallback(run: Run, name: str, fallback: str | None) -> None:
    """Raise MethodError if a solver did something simpler than asked, and that is forbidden."""
    section = run.recipe.calibration
    if section is not None and section.strict and fallback is not None:
        raise MethodError(
            f"{name}: {fallback} (calibration.strict). Without it, or --strict, the layer is taken "
            "as it is.",
            layer=name,
        )


def _check_finite(name: str, weight: Tensor) -> None:
    """Raise MethodError if a weight holds NaN or infinity."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        raise MethodError(
            f"{name}: {int((~finite).sum())} of {weight.numel()} weights are NaN or infinite. The "
            "file is damaged, or the model overflowed when it was saved; check the original."
        )


def _check_stored(run: Run, name: str, tensor: QuantizedTensor) -> None:
    """Raise MethodError if a stored parameter overflowed its dtype; warn if all are nearly zero."""
    floats = {part: one for part, one in tensor.parts.items() if one.is_floating_point()}
    for part, values in floats.items():
        if not bool(torch.isfinite(values).all()):
            raise MethodError(_overflow(run, name, part))
    if floats and all(float(one.abs().max()) < ROUGH for one in floats.values()):
        largest = _largest(run, name)
        if largest > 0:
            message = (
                f"{name}: the largest weight is {largest:.3g}, and float16, in which scales are "
                "stored, rounds numbers that small to a few, or to zero. If the layer matters, "
                "skip it with an override."
            )
            run.env.emit(Notice(message))


def _overflow(run: Run, name: str, part: str) -> str:
    """Return the sentence about numbers beyond float16: the weight's own, or an earlier layer's."""
    largest = _largest(run, name)
    problem = f"{name}: {part} doesn't fit float16; the largest weight is {largest:.3g}"
    if largest > HUGE:
        return f"{problem}. Skip this layer with an override."
    return (
        f"{problem}, and what was solved makes up for errors that layers before leave, one of them "
        "a huge one. Set calibration.input_error to 0, or skip this layer with an override."
    )


def _largest(run: Run, name: str) -> float:
    return float(run.source.read_weight(name).abs().max())
