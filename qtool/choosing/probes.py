"""A few blocks are solved with data too: by how much that changes prices, for all blocks alike.

Solving with data lowers the error of each choice by a factor of its own, wide groups and few bits
by another than narrow groups and many, so that prices of solutions without data rank choices
wrongly. The factors of the probed layers are taken apart into that of a choice and that of a kind
of linear (two-way layout of their logarithms), since single ones are noisy.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.choosing.candidates import OpenLayer
from qtool.steps.plan import LayerPlan, load_method

NUM_PROBES = 3
"""Blocks that are solved with data; of fewer than ten, one."""
BLOCKS_PER_PROBE = 10
TOKENS_PER_PRICED = 4
"""Going forward takes a quarter of what a gradient does, with blocks that are run again."""
Factors = Mapping[str, tuple[float, ...]]
"""By layer: what a price is multiplied by, for each of its choices."""


def probes(layers: Sequence[OpenLayer], blocks: str) -> tuple[OpenLayer, ...]:
    """Return the layers that are to be solved with data: those of a few blocks, evenly spread.

    Args:
        layers: What is open.
        blocks: Dotted name of the model's list of blocks.
    """
    gaining = [layer for layer in layers if any(map(learns, layer.plans))]
    parts = [(layer, _parts(layer, blocks)) for layer in gaining]
    names = list(dict.fromkeys(block for _, (block, _) in parts if block))
    count = min(NUM_PROBES, -(-len(names) // BLOCKS_PER_PROBE))
    chosen = {names[(2 * place + 1) * len(names) // (2 * count)] for place in range(count)}
    return tuple(layer for layer, (block, _) in parts if block in chosen)


def learns(plan: LayerPlan | None) -> bool:
    """Return whether a choice is solved for the inputs of its layer."""
    if plan is None:
        return False
    method = load_method(plan.method)
    return "hessian" in method.needs | method.uses


@torch.no_grad()
def input_hessians(
    model: CausalModel, layers: Sequence[OpenLayer], batches: Iterator[Tensor] | Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the mean of x x^T of the inputs of linears, each (in, in) float32, off the device.

    Args:
        model: The original.
        layers: Linears; those of one group share an input, which is taken once.
        batches: Tokens, each (samples, length) int64.
    """
    first = {layer.group: layer.name for layer in reversed(layers)}
    sums: dict[str, Tensor] = {}
    count = 0
    with ExitStack() as stack:
        for group, name in first.items():
            hook = partial(_add, sums, group)
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))
        for tokens in batches:
            model(tokens.to(model.device), use_cache=False)
            count += tokens.numel()
    means = {group: (total / count).cpu() for group, total in sums.items()}
    return {layer.name: means[layer.group] for layer in layers if layer.group in means}


def _add(sums: dict[str, Tensor], group: str, _module: nn.Module, arguments: Any) -> None:  # noqa: ANN401
    inputs = arguments[0].detach().flatten(0, -2).float()
    product = inputs.T @ inputs
    sums[group] = sums[group] + product if group in sums else product


def factors(
    layers: Sequence[OpenLayer],
    blocks: str,
    free: Mapping[str, Sequence[float]],
    calibrated: Mapping[str, Sequence[float]],
) -> Factors:
    """Return what the prices of all layers are to be multiplied by.

    Args:
        layers: What is open.
        blocks: Dotted name of the model's list of blocks.
        free: By probe, the prices of its choices, solved without data.
        calibrated: Solved with data.
    """
    kinds = {layer.name: _parts(layer, blocks)[1] for layer in layers}
    logs: dict[tuple[str, int], list[float]] = {}
    for name, prices in calibrated.items():
        for place, (old, new) in enumerate(zip(free[name], prices, strict=True)):
            if old > 0 and new > 0:
                ratio = torch.tensor(new / old, dtype=torch.float64).log().item()
                logs.setdefault((kinds[name], place), []).append(ratio)
    learned = {layer.name: [learns(plan) for plan in layer.plans] for layer in layers}
    return {
        layer.name: tuple(
            _factor(logs, kinds[layer.name], place) if gains else 1.0
            for place, gains in enumerate(learned[layer.name])
        )
        for layer in layers
    }


def _factor(logs: Mapping[tuple[str, int], Sequence[float]], kind: str, place: int) -> float:
    """Return exp(mean of the kind + mean of the choice - mean of all); 1 for what isn't probed."""
    of_kind = [value for (one, _), values in logs.items() if one == kind for value in values]
    of_place = [value for (_, one), values in logs.items() if one == place for value in values]
    if not of_kind or not of_place:
        return 1.0
    everything = [value for values in logs.values() for value in values]
    total = _mean(of_kind) + _mean(of_place) - _mean(everything)
    return float(torch.tensor(total, dtype=torch.float64).exp())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parts(layer: OpenLayer, blocks: str) -> tuple[str, str]:
    """Return the block and the kind of a linear; of a table no block."""
    if not layer.name.startswith(f"{blocks}."):
        return "", layer.name
    place, _, kind = layer.name.removeprefix(f"{blocks}.").partition(".")
    return f"{blocks}.{place}", kind
