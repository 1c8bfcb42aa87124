"""What each choice of each layer costs: the divergence that it causes, as gradients foretell it.

A choice is solved by the layer's own method, without data, since all choices of all layers are
solved only to be compared; where a method can't do without, rounding to nearest stands in for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qtool.base import Env, Progress, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.choosing.candidates import OpenLayer
from qtool.data.calibration import CalibrationSet, batches
from qtool.modeling.load import load_source
from qtool.modeling.source import ModelSource
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.run import Run
from qtool.steps.solve_table import solve_alone
from qtool.training.foretold import foretold_divergences

PIECE_TOKENS = 128
"""A sample is one draw of the gradient, so that there are to be many."""
WEIGHED_AT_ONCE = 2048
"""What the logits of a batch, and their gradients, take grows with it."""
SOLVING, WEIGHING = "solving choices", "weighing choices by gradients"
STAND_IN = "rtn"
"""For methods that can't do without data."""
Prices = dict[str, tuple[float, ...]]
"""By layer: nats per token, for each of its choices."""


def measure_prices(run: Run, layers: Sequence[OpenLayer], num_tokens: int) -> Prices:
    """Return the price of each choice of each layer.

    Args:
        run: Which model and samples, and where it is computed.
        layers: What is open.
        num_tokens: Of the calibration samples, that are used; at most all.

    Raises:
        MethodError: a layer doesn't see every token once, or a gradient isn't finite.
    """
    source, env, samples = run.source, run.env, run.calibration
    assert samples is not None
    solved = dict(_solved(source, layers, env))
    env.emit(Progress("loading the original"))
    model = load_source(source, env.device)
    parts = batches(pieces(samples, num_tokens), WEIGHED_AT_ONCE)
    tied = source.adapter.head if source.head_is_tied else None
    found = foretold_divergences(
        model,
        source.adapter.blocks,
        {layer.name: partial(_errors, run, layer.name, solved[layer.name]) for layer in layers},
        parts,
        torch.Generator(env.device).manual_seed(env.seed),
        lambda done: env.emit(Progress(WEIGHING, done, len(parts))),
        tied_head=tied,
    )
    return {name: tuple(values.tolist()) for name, values in found.items()}


def pieces(samples: CalibrationSet, num_tokens: int) -> list[Tensor]:
    """Return short samples, spread evenly over the calibration samples: each (length,) int64.

    All have the same length, but where the samples themselves are shorter.
    """
    cut = [
        piece
        for sample in samples.samples
        for piece in sample.split(PIECE_TOKENS)
        if len(piece) == min(PIECE_TOKENS, len(sample))
    ]
    count = max(2, min(len(cut), num_tokens // max(map(len, cut))))
    places = sorted({(2 * place + 1) * len(cut) // (2 * count) for place in range(count)})
    return sorted((cut[place] for place in places), key=len)


def _solved(
    source: ModelSource, layers: Sequence[OpenLayer], env: Env
) -> Iterator[tuple[str, list[QuantizedTensor | None]]]:
    """Yield each layer's choices, packed, off the device; None: it isn't quantized."""
    for done, layer in enumerate(layers, start=1):
        weight = source.read_weight(layer.name).to(env.device)
        yield layer.name, [_solution(plan, weight, env) for plan in layer.plans]
        env.emit(Progress(SOLVING, done, len(layers), layer.name))


def _solution(plan: LayerPlan | None, weight: Tensor, env: Env) -> QuantizedTensor | None:
    if plan is None:
        return None
    if load_method(plan.method).needs:
        plan = replace(plan, method=STAND_IN, options=load_method(STAND_IN).options())
    tensor = solve_alone(plan, weight, env).tensor
    parts = {name: part.cpu() for name, part in tensor.parts.items()}
    return QuantizedTensor(tensor.format, tensor.scheme, tensor.shape, parts)


def _errors(run: Run, name: str, choices: Sequence[QuantizedTensor | None]) -> list[Tensor]:
    """Return what each choice makes of a weight, less the weight."""
    device = run.env.device
    weight = run.source.read_weight(name).to(device)
    return [
        torch.zeros_like(weight) if tensor is None else _dequantized(tensor, device) - weight
        for tensor in choices
    ]


def _dequantized(tensor: QuantizedTensor, device: str) -> Tensor:
    parts = {name: part.to(device) for name, part in tensor.parts.items()}
    moved = QuantizedTensor(tensor.format, tensor.scheme, tensor.shape, parts)
    return codec(tensor.format).dequantize(moved, torch.float32)
