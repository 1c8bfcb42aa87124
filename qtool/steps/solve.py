"""Quantize a model layer by layer, each read, solved, written and dropped before the next."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qtool.base import Notice, Progress, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, codec, scheme_from_json
from qtool.checkpoint.spool import Made
from qtool.checkpoint.spooled_layer import SpooledLayer
from qtool.checkpoint.writer import CheckpointWriter
from qtool.engines import Shared
from qtool.modeling.source import ModelSource
from qtool.scheme import ActivationScheme
from qtool.steps.correct_biases import announced_biases, correct_biases_once, corrected_biases
from qtool.steps.coverage import coverage, warn_of_experts
from qtool.steps.memory import peak_memory
from qtool.steps.plan import LayerPlan
from qtool.steps.run import Run
from qtool.steps.shared_walk import SharedWalk, plain_walk, shared_run
from qtool.steps.solve_apart import made_apart, together
from qtool.steps.solve_layer import check_fallback, solved_layer
from qtool.steps.table_statistics import hessian_of
from qtool.steps.tune_blocks import SOLVED, TUNED_BLOCK, draft_of, tune_block_once
from qtool.steps.tune_model import MODEL, SolvedModel, tune_model_once
from qtool.steps.weigh_tokens import weigh_tokens_once
from qtool.walk.solved import SolvedLinear
from qtool.walk.walk import Walk
from qtool.wording import gigabytes

WIDE_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One row of the report."""

    name: str
    entry: LayerEntry
    metrics: Mapping[str, float]
    seconds: float
    fallback: str | None = None


def solve(run: Run, writer: CheckpointWriter) -> tuple[LayerResult, ...]:
    """Quantize all layers of a plan and copy all other tensors.

    Linears of the blocks are solved for their inputs where there are samples, and so is the
    head; other layers without data. Tells of each layer.

    Raises:
        MethodError: a weight or an input isn't finite, a method refused a layer, or with
            `calibration.strict` did something simpler.
    """
    results: list[LayerResult] = []
    tuning = run.recipe.tuning

    def finish(layer: LayerPlan, walk: Walk | None = None) -> LayerResult:
        results.append(solve_layer_once(run, writer, layer, walk))
        _announce(run, results[-1], len(results))
        return results[-1]

    with shared_run(run) as shared, walking(run, writer, shared) as walk:
        biased = announced_biases(run)
        if shared is not None:
            assert walk is None or isinstance(walk, SharedWalk)
            return _solve_apart(run, writer, walk, shared)
        for block, layers in groupby(run.plan.in_blocks, partial(block_of, run.source)):
            entries = {layer.name: finish(layer, walk).entry for layer in layers}
            if walk is not None and tuning.blocks is not None:
                tune_block_once(run, tuning.blocks, writer, walk, block, entries)
            if walk is not None and block in biased:
                correct_biases_once(run, writer, walk, block, biased[block])
    for layer in run.plan.layers:
        if layer.role != "block":
            finish(layer)
    warn_of_experts(coverage(results), run.env.emit)
    return tuple(results)


def solve_layer_once(
    run: Run, writer: CheckpointWriter, layer: LayerPlan, walk: Walk | None
) -> LayerResult:
    """Quantize one layer, unless an earlier run did, and tell the walk of it, if there is one."""
    draft = SOLVED if layer.role == "block" and run.recipe.tuning.is_on else None
    under = partial(hessian_of, run, writer)
    notes = writer.once(layer.name, partial(solved_layer, run, layer, walk, under), draft=draft)
    return _result(run, writer, layer, walk, notes)


def _result(
    run: Run,
    writer: CheckpointWriter,
    layer: LayerPlan,
    walk: Walk | None,
    notes: Mapping[str, Any],
) -> LayerResult:
    """Return what became of a layer that is stored, and tell the walk of it."""
    check_fallback(run, layer.name, notes["fallback"])
    entry = _entry(layer, notes)
    if walk is not None and layer.role == "block":
        draft = SOLVED if run.recipe.tuning.is_on else None
        stored = writer.stored(layer.name, entry, draft=draft)
        weight = partial(_stored_weight, stored, run.env.device)
        walk.put(layer.name, SolvedLinear(weight, entry.activation))
    return LayerResult(layer.name, entry, notes["metrics"], notes["seconds"], notes["fallback"])


def _solve_apart(
    run: Run, writer: CheckpointWriter, walk: SharedWalk | None, shared: Shared
) -> tuple[LayerResult, ...]:
    """Solve all layers on workers: those at once that don't wait for one another."""
    results: list[LayerResult] = []
    for layers in together(run, walk):
        make = partial(made_apart, run, writer, walk, shared, layers)
        names = [layer.name for layer in layers]
        for layer, notes in zip(layers, writer.once_each(names, make), strict=True):
            results.append(_result(run, writer, layer, walk, notes))
            _announce(run, results[-1], len(results))
    warn_of_experts(coverage(results), run.env.emit)
    return tuple(results)


def _entry(layer: LayerPlan, notes: Mapping[str, Any]) -> LayerEntry:
    """Return what a manifest says of a layer, by its plan and the notes of its solution."""
    inputs = notes.get("activation")
    return LayerEntry(
        format=notes["format"],
        scheme=scheme_from_json(notes["scheme"]),
        shape=layer.shape,
        method=notes.get("method", layer.method),  # older runs noted none
        activation=None if inputs is None else ActivationScheme(**inputs),
        tokens_from=notes.get("tokens_from"),
    )


def block_of(source: ModelSource, layer: LayerPlan | LayerResult) -> str:
    """Return the dotted name of the block of a layer."""
    depth = source.adapter.blocks.count(".") + 2
    return ".".join(layer.name.split(".")[:depth])


def settle(
    run: Run, writer: CheckpointWriter, results: Sequence[LayerResult]
) -> dict[str, list[dict[str, Any]]]:
    """Write what gradients have left of the layers, and copy all other tensors.

    Returns:
        The curves of tuning, by the name of the block or `model`; see `training.descent.Point`.
    """
    tuning, learned = run.recipe.tuning, dict[str, Tensor]()
    in_blocks = {layer.name for layer in run.plan.in_blocks} if tuning.is_on else set()
    drafts = {
        result.name: partial(_draft, run, writer, result)
        for result in results
        if result.name in in_blocks
    }
    if tuning.end_to_end is not None:
        start = SolvedModel(
            layers={name: draft() for name, draft in drafts.items()},
            activations={result.name: result.entry.activation for result in results},
            tables={
                result.name: writer.load(result.name, result.entry, run.env.device)
                for result in results
                if result.name not in in_blocks
            },
        )
        learned = tune_model_once(run, tuning.end_to_end, writer, start)
    for result in results:
        if result.name in in_blocks:
            writer.once(result.name, partial(_settled, drafts[result.name], result, learned))
    learned = {**corrected_biases(run, writer), **learned}
    for name in run.plan.kept:
        made = partial(Made, learned[name]) if name in learned else partial(copied, run, name)
        writer.once(name, made)
    return _curves(run, writer)


def _curves(run: Run, writer: CheckpointWriter) -> dict[str, list[dict[str, Any]]]:
    tuning, curves = run.recipe.tuning, {}
    if tuning.blocks is not None:
        for block in dict.fromkeys(block_of(run.source, layer) for layer in run.plan.in_blocks):
            curves[block] = writer.notes(block, draft=TUNED_BLOCK)["curve"]
    if tuning.end_to_end is not None:
        curves["model"] = writer.notes(run.source.adapter.blocks, draft=MODEL)["curve"]
    return curves


def _draft(run: Run, writer: CheckpointWriter, result: LayerResult) -> QuantizedTensor:
    block = block_of(run.source, result) if run.recipe.tuning.blocks is not None else None
    return draft_of(writer, result.name, result.entry, run.env.device, block=block)


def _settled(
    draft: Callable[[], QuantizedTensor], result: LayerResult, learned: Mapping[str, Tensor]
) -> Made:
    tensor = draft()
    parts = {
        name: learned.get(f"{result.name}.{name}", part) for name, part in tensor.parts.items()
    }
    return Made(replace(tensor, parts=parts))


@contextmanager
def walking(
    run: Run, writer: CheckpointWriter, shared: Shared | None = None
) -> Iterator[Walk | None]:
    """Give a walk through the blocks; None without samples.

    `shared` is the run as workers have it, if they measure what linears see.
    """
    section = run.recipe.calibration
    if section is None or run.calibration is None:
        yield None
        return
    directory = writer.work_dir / "streams"  # of the blocks' inputs
    shutil.rmtree(directory, ignore_errors=True)  # of an attempt that failed
    groups = section.output_groups
    weigh = None if groups is None else partial(weigh_tokens_once, run, writer, groups)
    walk = plain_walk(run, directory, weigh=weigh)
    if run.pool is not None and shared is not None:
        walk = SharedWalk(run, run.pool, shared, directory)
    try:
        yield walk
    finally:
        walk.end()
        shutil.rmtree(directory, ignore_errors=True)


def _stored_weight(stored: SpooledLayer, device: str) -> Tensor:
    """Return what a stored layer means, (out_features, in_features) float32."""
    return codec(stored.entry.format).dequantize(stored.load(device), torch.float32)


def copied(run: Run, name: str) -> Made:
    """Read a tensor that isn't quantized; warns if it isn't finite."""
    values = run.source.read(name)
    if values.dtype in WIDE_FLOATS:  # of narrower ones torch can't say it
        count = values.numel() - int(torch.isfinite(values).sum())
        if count:  # only the model's owner knows whether it is used
            message = f"{name}: {count} of {values.numel()} values are NaN or infinite; copied as "
            message += "it is. Check the original if that isn't meant."
            run.env.emit(Notice(message))
    return Made(values)


def _announce(run: Run, result: LayerResult, done: int) -> None:
    """Tell that a layer is done, and warn if the solver fell back."""
    env, total = run.env, len(run.plan.layers)
    error = result.metrics.get("added_error", result.metrics.get("nmse", 0.0))
    memory = gigabytes(peak_memory(env.device))
    detail = f"{result.name}  error {error:.2e}  memory {memory}"
    env.emit(Progress("quantize", done, total, detail))
    if result.fallback is not None:
        env.emit(Notice(f"{result.name}: {result.fallback}"))
