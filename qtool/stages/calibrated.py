"""Quantize block by block with calibration data: later layers see the errors of earlier ones."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.hessian import MAX_DAMPING
from qtool.core.moments import OutputError, Shifter, added_error, output_errors
from qtool.data.calibration import CalibrationSet, batches
from qtool.errors import MethodError
from qtool.modeling.blocks import Block, BlockModel
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import CalibrationSection
from qtool.stages.plan import LayerPlan, Plan, load_method
from qtool.stages.solve import (
    LayerResult,
    announce,
    check_finite,
    check_stored,
    copy_kept,
    solve_data_free,
    solve_one,
    write_solution,
)
from qtool.stages.statistics import InputStatistics, measure_inputs, why_not_finite, writer_of
from qtool.stages.streams import Streams, make_streams

FEW_TOKENS = 4
"""Below this many tokens per input the Hessian is noise in many directions: warn, damp more."""
CLEARLY = 0.01
"""A grouping other than the first must save one percent of what rounding adds: kernels like it."""
DEFAULT_DAMPING = 0.01
BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}


def solve_calibrated(
    source: ModelSource,
    plan: Plan,
    calibration: CalibrationSet,
    writer: CheckpointWriter,
    env: Env,
    section: CalibrationSection,
) -> tuple[LayerResult, ...]:
    """Walk the blocks; quantize each group of linears that share an input, then the next.

    Layers outside the blocks are quantized without data.

    Raises:
        MethodError: inputs aren't finite, or with `strict` a solver fell back.
    """
    layers = {layer.name: layer for layer in plan.layers}
    walked = [layer.name for layer in plan.layers if layer.role == "block"]
    if all(writer.finished(name) is not None for name in walked):
        restored = solve_data_free(source, plan, writer, env)  # it solves nothing in the blocks
        for result in restored:
            check_fallback(section, result.name, result.fallback)
        return restored
    model = BlockModel(source, env.device, dtype=section.dtype)
    results = []
    train, held_out = calibration.split(section.holdout)
    _warn_of_few_tokens(plan, train.num_tokens, env)
    env.emit("phase", {"name": "capturing the inputs of the first block"})
    with _streams(model, train, held_out, writer, section) as streams:
        env.emit("phase", {"name": "solving"})
        for index in range(source.num_blocks):
            prefix = f"{source.adapter.blocks}.{index}"
            original = model.load(index)
            step = _Step(source, writer, env, section, prefix, original, original.copy())
            for names in source.adapter.linears:
                group = [layers[f"{prefix}.{n}"] for n in names if f"{prefix}.{n}" in layers]
                for result in step.solve(group, streams):
                    results.append(result)
                    announce(env, result, len(results), len(plan.layers))
            if index + 1 < source.num_blocks:
                streams.advance(original, step.quantized)
    for layer in plan.layers:
        if layer.role != "block":
            results.append(solve_one(source, layer, writer, env))
            announce(env, results[-1], len(results), len(plan.layers))
    copy_kept(source, plan, writer, env)
    return tuple(results)


@contextmanager
def _streams(
    model: BlockModel,
    train: CalibrationSet,
    held_out: CalibrationSet,
    writer: CheckpointWriter,
    section: CalibrationSection,
) -> Iterator[Streams]:
    limit = BATCH_TOKENS[torch.device(model.device).type]
    first, rest = batches(train.samples, limit), batches(held_out.samples, limit)
    directory = writer.work_dir / "streams"
    shutil.rmtree(directory, ignore_errors=True)  # of an attempt that failed
    try:
        # Nothing here keeps what was captured: it would stay in memory for the whole walk.
        yield make_streams(
            model.capture([*first, *rest]),
            len(first),
            device=model.device,
            directory=directory if section.cache == "disk" else None,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Step:
    """One block: the original, and the copy that is quantized group by group."""

    source: ModelSource
    writer: CheckpointWriter
    env: Env
    section: CalibrationSection
    prefix: str
    original: Block
    quantized: Block

    def solve(self, group: Sequence[LayerPlan], streams: Streams) -> Iterator[LayerResult]:
        """Quantize linears that share an input, put them into the quantized block, write them."""
        inner = [layer.name.removeprefix(self.prefix + ".") for layer in group]
        for name, (result, weight) in zip(inner, self._solved(group, streams), strict=True):
            self.quantized.set_weight(name, weight, transposed=self.source.adapter.conv1d)
            yield result

    def _measure(self, linear: str, streams: Streams) -> InputStatistics:
        residual = self.source.residual if self.section.residual_error else None
        statistics = measure_inputs(
            linear,
            self.original,
            self.quantized,
            streams,
            writer=writer_of(residual, linear),
            token_cap=self.section.token_cap,
        )
        if not statistics.is_finite():
            walked_in = streams.original[0].dtype
            name = f"{self.prefix}.{linear}"
            raise MethodError(why_not_finite(self.source, name, walked_in), layer=name)
        return statistics

    def _restore(self, layer: LayerPlan) -> tuple[LayerResult, Tensor]:
        """Take a layer that an earlier run finished."""
        result = solve_one(self.source, layer, self.writer, self.env)
        check_fallback(self.section, layer.name, result.fallback)
        tensor = self.writer.load(layer.name, result.entry)
        return result, codec(tensor.format).dequantize(tensor, torch.float32)

    def _solved(
        self, group: Sequence[LayerPlan], streams: Streams
    ) -> Iterator[tuple[LayerResult, Tensor]]:
        """Yield results and dequantized weights; nothing is measured for what is finished."""
        if all(self.writer.finished(layer.name) is not None for layer in group):
            yield from map(self._restore, group)
            return
        statistics = self._measure(group[0].name.removeprefix(self.prefix + "."), streams)
        shifter = statistics.shifter(raised(DEFAULT_DAMPING, statistics.tokens_per_input))
        for layer in group:
            if self.writer.finished(layer.name) is not None:
                yield self._restore(layer)
            else:
                yield self._solve(layer, statistics, shifter)

    def _solve(
        self, layer: LayerPlan, statistics: InputStatistics, shifter: Shifter
    ) -> tuple[LayerResult, Tensor]:
        started = time.perf_counter()
        weight = self.source.read_weight(layer.name).to(self.env.device)
        check_finite(layer.name, weight)
        asked = self.section.input_error
        target, strength = shifter.shift(weight, None if asked == "auto" else asked)
        alternatives = layer.alternatives()
        candidates = [
            _candidate(alternative, target, statistics, self.env) for alternative in alternatives
        ]
        held_out = statistics.held_out
        measure = output_errors(held_out, weight)
        errors = [measure.of(quantized) for _, quantized in candidates]
        added = [added_error(held_out, target, quantized) for _, quantized in candidates]
        best = choose([error.error for error in errors], clearly=CLEARLY * added[0])
        solution, quantized = candidates[best]
        check_stored(layer.name, solution.tensor, weight)
        check_fallback(self.section, layer.name, solution.fallback)
        nearest = round_to_nearest(alternatives[best], weight)
        rounded = measure.of(nearest)
        self._check_gain(layer, rounded, errors[best])
        power = max(rounded.power, 1e-30)
        notes = {
            **solution.metrics,
            "output_error": errors[best].relative,
            "output_error_rounded": rounded.relative,
            "added_error": added[best] / power,
            "added_error_rounded": added_error(held_out, weight, nearest) / power,
            "input_error_strength": strength,
            "tokens_per_input": statistics.tokens_per_input,
        }
        if len(errors) > 1:
            dims = [alternative.scheme.group_dim for alternative in alternatives]
            pairs = zip(dims, errors, strict=True)
            notes |= {f"output_error_{dim}": error.relative for dim, error in pairs}
        seconds = time.perf_counter() - started
        solution = replace(solution, metrics=notes)
        return write_solution(layer, solution, self.writer, seconds=seconds), quantized

    def _check_gain(self, layer: LayerPlan, before: OutputError, after: OutputError) -> None:
        if after.error > before.error:
            message = (
                f"{layer.name}: on held-out samples the solution is worse than rounding to nearest "
                f"({after.relative:.2e}, not {before.relative:.2e}). Use more samples, or text "
                "that is more like the model's."
            )
            self.env.emit("warning", {"message": message})


def check_fallback(section: CalibrationSection, name: str, fallback: str | None) -> None:
    """Raise MethodError if a solver did something simpler than asked, and that is forbidden."""
    if section.strict and fallback is not None:
        raise MethodError(
            f"{name}: {fallback} (calibration.strict). Without it, or --strict, the layer is taken "
            "as it is.",
            layer=name,
        )


def _warn_of_few_tokens(plan: Plan, num_tokens: int, env: Env) -> None:
    """Say once, before anything is solved, that there is too little data for some layers."""
    widths = sorted({layer.shape.in_features for layer in plan.layers if layer.role == "block"})
    starved = [width for width in widths if num_tokens < FEW_TOKENS * width]
    if starved:
        message = (
            f"{num_tokens} calibration tokens are fewer than {FEW_TOKENS} per input for layers of "
            f"{' and '.join(map(str, starved))} inputs: their damping is raised. Use more or "
            "longer samples."
        )
        env.emit("warning", {"message": message})


def raised(damping: float, tokens_per_input: float) -> float:
    """Return the damping asked for, raised where there are few tokens per input."""
    if tokens_per_input >= FEW_TOKENS:
        return damping
    return min(damping * FEW_TOKENS / max(tokens_per_input, 0.1), MAX_DAMPING)


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
        statistics={"hessian": statistics.train.inputs} if "hessian" in wanted else {},
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
