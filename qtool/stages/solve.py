"""Quantize layer by layer, each read, solved, written and dropped before the next."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import MethodError, about
from qtool.modeling.source import ModelSource
from qtool.scheme import WeightScheme
from qtool.stages.memory import peak_memory
from qtool.stages.plan import LayerPlan, Plan, load_method

WIDE_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One row of the report."""

    name: str
    entry: LayerEntry
    metrics: Mapping[str, float]
    seconds: float
    fallback: str | None = None


def solve_data_free(
    source: ModelSource, plan: Plan, writer: CheckpointWriter, env: Env
) -> tuple[LayerResult, ...]:
    """Quantize all layers of a plan without calibration data and copy all other tensors.

    Emits `layer` after each layer.

    Raises:
        MethodError: a weight isn't finite, or a method refused it.
    """
    results = []
    for layer in plan.layers:
        results.append(solve_one(source, layer, writer, env))
        announce(env, results[-1], len(results), len(plan.layers))
    copy_kept(source, plan, writer, env)
    return tuple(results)


def solve_one(
    source: ModelSource, layer: LayerPlan, writer: CheckpointWriter, env: Env
) -> LayerResult:
    """Quantize and write one layer without data, unless an earlier run has finished it."""
    notes = writer.finished(layer.name)
    if notes is not None:
        writer.keep(layer.name)
        entry = LayerEntry(
            format=notes["format"],
            scheme=WeightScheme(**notes["scheme"]),
            shape=layer.shape,
            method=layer.method,
        )
        return LayerResult(layer.name, entry, notes["metrics"], notes["seconds"], notes["fallback"])
    started = time.perf_counter()
    weight = source.read_weight(layer.name).to(env.device)
    check_finite(layer.name, weight)
    generator = torch.Generator(env.device).manual_seed(env.seed)
    problem = LayerProblem(name=layer.name, weight=weight, scheme=layer.scheme, generator=generator)
    with about(layer=layer.name):
        solution = load_method(layer.method).solve(problem, layer.options)
    check_stored(layer.name, solution.tensor, weight)
    return write_solution(layer, solution, writer, seconds=time.perf_counter() - started)


def write_solution(
    layer: LayerPlan, solution: LayerSolution, writer: CheckpointWriter, *, seconds: float
) -> LayerResult:
    """Write a solved layer, with the notes that a resumed run needs."""
    tensor = solution.tensor
    notes = {
        "format": tensor.format,
        "scheme": asdict(tensor.scheme),
        "metrics": dict(solution.metrics),
        "fallback": solution.fallback,
        "seconds": seconds,
    }
    writer.add(layer.name, tensor, notes)
    entry = LayerEntry(
        format=tensor.format, scheme=tensor.scheme, shape=tensor.shape, method=layer.method
    )
    return LayerResult(layer.name, entry, solution.metrics, seconds, solution.fallback)


def copy_kept(source: ModelSource, plan: Plan, writer: CheckpointWriter, env: Env) -> None:
    """Copy the tensors that aren't quantized; emits `warning` for one that isn't finite."""
    for name in plan.kept:
        if writer.finished(name) is None:
            values = source.read(name)
            _warn_of_not_finite(name, values, env)
            writer.add(name, values)
        else:
            writer.keep(name)


def _warn_of_not_finite(name: str, values: Tensor, env: Env) -> None:
    """Say that a tensor is copied as it is: only the model's owner knows whether it is used."""
    if values.dtype not in WIDE_FLOATS:  # of narrower ones torch can't say it
        return
    count = values.numel() - int(torch.isfinite(values).sum())
    if count:
        message = f"{name}: {count} of {values.numel()} values are NaN or infinite; copied as it is"
        env.emit("warning", {"message": f"{message}. Check the original if that isn't meant."})


def announce(env: Env, result: LayerResult, done: int, total: int) -> None:
    """Emit `layer`, and `warning` if the solver fell back."""
    error = result.metrics.get("added_error", result.metrics.get("nmse", 0.0))
    values = {"index": done - 1, "total": total, "name": result.name, "error": error}
    env.emit("layer", {**values, "memory": peak_memory(env.device)})
    if result.fallback is not None:
        env.emit("warning", {"message": f"{result.name}: {result.fallback}"})


def check_finite(name: str, weight: Tensor) -> None:
    """Raise MethodError if a weight holds NaN or infinity."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        raise MethodError(
            f"{name}: {int((~finite).sum())} of {weight.numel()} weights are NaN or infinite. The "
            "file is damaged, or the model overflowed when it was saved; check the original.",
            layer=name,
        )


def check_stored(name: str, tensor: QuantizedTensor, weight: Tensor) -> None:
    """Raise MethodError if a stored parameter overflowed its dtype."""
    for part, values in tensor.parts.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise MethodError(
                f"{name}: {part} doesn't fit float16; the largest weight is "
                f"{float(weight.abs().max()):.3g}. Skip this layer with an override.",
                layer=name,
            )
