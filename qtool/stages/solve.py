"""Quantize layer by layer, each read, solved, written and dropped before the next."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qtool.base import Env, LayerProblem, LayerSolution
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import MethodError
from qtool.modeling.source import ModelSource
from qtool.stages.memory import peak_memory
from qtool.stages.plan import LayerPlan, Plan, load_method


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One row of the report."""

    name: str
    entry: LayerEntry
    metrics: Mapping[str, float]
    seconds: float


def solve_data_free(
    source: ModelSource, plan: Plan, writer: CheckpointWriter, env: Env
) -> tuple[LayerResult, ...]:
    """Quantize all layers of a plan without calibration data and copy all other tensors.

    Emits `layer` after each layer.

    Raises:
        MethodError: a weight isn't finite, or a method refused it.
    """
    results = []
    for index, layer in enumerate(plan.layers):
        result = _restored(layer, writer) or _solved(source, layer, writer, env)
        results.append(result)
        env.emit(
            "layer",
            {
                "index": index,
                "total": len(plan.layers),
                "name": layer.name,
                "nmse": result.metrics.get("nmse", 0.0),
                "memory": peak_memory(env.device),
            },
        )
    for name in plan.kept:
        if writer.finished(name) is None:
            writer.add(name, source.read(name))
        else:
            writer.keep(name)
    return tuple(results)


def _restored(layer: LayerPlan, writer: CheckpointWriter) -> LayerResult | None:
    """Return the result of a layer that an earlier run of the same recipe finished."""
    notes = writer.finished(layer.name)
    if notes is None:
        return None
    writer.keep(layer.name)
    entry = LayerEntry(
        format=notes["format"], scheme=layer.scheme, shape=layer.shape, method=layer.method
    )
    return LayerResult(layer.name, entry, notes["metrics"], notes["seconds"])


def _solved(
    source: ModelSource, layer: LayerPlan, writer: CheckpointWriter, env: Env
) -> LayerResult:
    started = time.perf_counter()
    solution = solve_layer(source, layer, env)
    seconds = time.perf_counter() - started
    tensor = solution.tensor
    notes = {"format": tensor.format, "metrics": dict(solution.metrics), "seconds": seconds}
    writer.add(layer.name, tensor, notes)
    entry = LayerEntry(
        format=tensor.format, scheme=tensor.scheme, shape=tensor.shape, method=layer.method
    )
    return LayerResult(layer.name, entry, solution.metrics, seconds)


def solve_layer(source: ModelSource, layer: LayerPlan, env: Env) -> LayerSolution:
    """Read one weight and quantize it."""
    weight = source.read_weight(layer.name).to(env.device)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise MethodError(
            f"{layer.name}: {bad} of {weight.numel()} weights are NaN or infinite. The file is "
            "damaged, or the model overflowed when it was saved; check the original."
        )
    generator = torch.Generator(env.device).manual_seed(env.seed)
    problem = LayerProblem(name=layer.name, weight=weight, scheme=layer.scheme, generator=generator)
    solution = load_method(layer.method).solve(problem, layer.options)
    for part, values in solution.tensor.parts.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise MethodError(
                f"{layer.name}: {part} doesn't fit float16; the largest weight is "
                f"{float(weight.abs().max()):.3g}. Skip this layer with an override."
            )
    return solution
