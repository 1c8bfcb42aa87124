"""Quantize block by block with calibration data: later layers see the errors of earlier ones."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.writer import CheckpointWriter
from qtool.data.calibration import CalibrationSet, batches
from qtool.errors import MethodError
from qtool.modeling.blocks import Block, BlockModel
from qtool.modeling.source import ModelSource
from qtool.stages.plan import LayerPlan, Plan, load_method
from qtool.stages.solve import (
    LayerResult,
    announce,
    check_finite,
    check_stored,
    copy_kept,
    solve_one,
    write_solution,
)
from qtool.stages.statistics import (
    InputStatistics,
    Streams,
    measure_inputs,
    output_error,
    shift_target,
)

FEW_TOKENS = 4
"""Below this many tokens per input the Hessian is noise in many directions: warn, damp more."""
CLEARLY = 0.99
"""A grouping other than the first must lower the held-out error by one percent: kernels like it."""
DEFAULT_DAMPING = 0.01
BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """How the blocks are walked."""

    holdout: float = 0.1
    """Fraction of the samples that every choice is made on."""
    token_cap: float = 10.0
    """Tokens are shrunk to this multiple of the median norm before they enter a Hessian."""
    input_error: float | None = None
    """Share of the upstream error that each layer compensates; None: chosen per layer."""
    strict: bool = False
    """Fail where a solver would fall back to something simpler."""


def solve_calibrated(
    source: ModelSource,
    plan: Plan,
    calibration: CalibrationSet,
    writer: CheckpointWriter,
    env: Env,
    walk: Walk,
) -> tuple[LayerResult, ...]:
    """Walk the blocks; quantize each group of linears that share an input, then the next.

    Layers outside the blocks are quantized without data.

    Raises:
        MethodError: inputs aren't finite, or with `strict` a solver fell back.
    """
    model = BlockModel(source, env.device)
    streams = _capture(model, calibration, env, walk)
    layers = {layer.name: layer for layer in plan.layers}
    results = []
    for index in range(source.num_blocks):
        prefix = f"{source.adapter.blocks}.{index}"
        original = model.load(index)
        quantized = original.copy()
        for names in source.adapter.linears:
            group = [layers[f"{prefix}.{n}"] for n in names if f"{prefix}.{n}" in layers]
            if group:
                step = _Step(source, writer, env, walk, prefix, original, quantized)
                for result in step.solve(group, streams):
                    results.append(result)
                    announce(env, result, len(results), len(plan.layers))
        streams.advance(original, quantized)
    for layer in plan.layers:
        if layer.role != "block":
            results.append(solve_one(source, layer, writer, env))
            announce(env, results[-1], len(results), len(plan.layers))
    copy_kept(source, plan, writer)
    return tuple(results)


def _capture(model: BlockModel, calibration: CalibrationSet, env: Env, walk: Walk) -> Streams:
    train, held_out = calibration.split(walk.holdout)
    limit = BATCH_TOKENS[torch.device(env.device).type]
    first = batches(train.samples, limit)
    hidden = model.capture([*first, *batches(held_out.samples, limit)])
    return Streams(hidden, list(hidden), len(first))


@dataclass(frozen=True, slots=True)
class _Step:
    """One group of linears of one block."""

    source: ModelSource
    writer: CheckpointWriter
    env: Env
    walk: Walk
    prefix: str
    original: Block
    quantized: Block

    def solve(self, group: Sequence[LayerPlan], streams: Streams) -> Iterator[LayerResult]:
        """Quantize the linears of the group, put them into the quantized block, write them."""
        statistics: InputStatistics | None = None
        for layer in group:
            inner = layer.name.removeprefix(self.prefix + ".")
            if self.writer.finished(layer.name) is not None:
                result, weight = self._restore(layer)
            else:
                if statistics is None:
                    statistics = measure_inputs(
                        inner,
                        self.original,
                        self.quantized,
                        streams,
                        token_cap=self.walk.token_cap,
                    )
                result, weight = self._solve(layer, statistics)
            self.quantized.set_weight(inner, weight, transposed=self.source.adapter.conv1d)
            yield result

    def _restore(self, layer: LayerPlan) -> tuple[LayerResult, Tensor]:
        """Take a layer that an earlier run finished."""
        result = solve_one(self.source, layer, self.writer, self.env)
        tensor = self.writer.load(layer.name, result.entry)
        return result, codec(tensor.format).dequantize(tensor, torch.float32)

    def _solve(self, layer: LayerPlan, statistics: InputStatistics) -> tuple[LayerResult, Tensor]:
        started = time.perf_counter()
        weight = self.source.read_weight(layer.name).to(self.env.device)
        check_finite(layer.name, weight)
        damping = self._damping(layer, statistics)
        target, strength = shift_target(
            statistics, weight, damping=damping, strength=self.walk.input_error
        )
        candidates = [
            self._candidate(alternative, target, statistics, damping)
            for alternative in layer.alternatives()
        ]
        errors = [output_error(statistics, weight, quantized) for _, quantized in candidates]
        best = choose(errors)
        solution, quantized = candidates[best]
        check_stored(layer.name, solution.tensor, weight)
        if self.walk.strict and solution.fallback is not None:
            raise MethodError(f"{layer.name}: {solution.fallback} (calibration.strict).")
        notes = {
            **solution.metrics,
            "output_error": errors[best],
            "input_error_strength": strength,
            "tokens_per_input": statistics.num_tokens / weight.shape[1],
        }
        if len(errors) > 1:
            schemes = [alternative.scheme.group_dim for alternative in layer.alternatives()]
            notes |= {f"output_error_{s}": e for s, e in zip(schemes, errors, strict=True)}
        seconds = time.perf_counter() - started
        solution = replace(solution, metrics=notes)
        return write_solution(layer, solution, self.writer, seconds=seconds), quantized

    def _damping(self, layer: LayerPlan, statistics: InputStatistics) -> float:
        """Return the damping asked for, raised where there are few tokens per input."""
        damping = float(getattr(layer.options, "damping", DEFAULT_DAMPING))
        ratio = statistics.num_tokens / len(statistics.hessian)
        if ratio >= FEW_TOKENS:
            return damping
        raised = damping * FEW_TOKENS / max(ratio, 0.1)
        self.env.emit(
            "warning",
            {
                "message": f"{layer.name}: {ratio:.1f} calibration tokens per input, fewer than "
                f"{FEW_TOKENS}; damping raised from {damping:g} to {raised:g}. Use more samples."
            },
        )
        return raised

    def _candidate(
        self, layer: LayerPlan, target: Tensor, statistics: InputStatistics, damping: float
    ) -> tuple[LayerSolution, Tensor]:
        """Solve with one of the schemes that the recipe lets qtool choose from."""
        method = load_method(layer.method)
        options = layer.options
        if hasattr(options, "damping"):
            options = replace(options, damping=damping)
        wanted = method.needs | method.uses
        problem = LayerProblem(
            name=layer.name,
            weight=target,
            scheme=layer.scheme,
            statistics={"hessian": statistics.hessian} if "hessian" in wanted else {},
            generator=torch.Generator(self.env.device).manual_seed(self.env.seed),
        )
        solution = method.solve(problem, options)
        return solution, codec(solution.tensor.format).dequantize(solution.tensor, torch.float32)


def choose(errors: Sequence[float]) -> int:
    """Return the candidate with the smallest error; the first unless another is clearly better."""
    best = min(range(len(errors)), key=errors.__getitem__)
    return best if errors[best] < CLEARLY * errors[0] else 0
