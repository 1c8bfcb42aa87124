"""The step `choose`: of all choices of all layers those that a budget allows, and cost least."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qtool.base import Notice
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.choosing.candidates import Budget, OpenLayer, budget_of, chosen_plan, open_layers
from qtool.choosing.layers import Margin, PricedLayer, allocate, margins
from qtool.choosing.prices import Prices, measure_prices
from qtool.modeling.source import ModelSource
from qtool.recipe.choosing import ChoosingSection
from qtool.recipe.schema import Recipe
from qtool.steps.plan import LayerPlan, Plan
from qtool.steps.run import Run
from qtool.storage.memo import Memo
from qtool.storage.plain_json import json_text
from qtool.storage.store import Store

PRICES = "prices"
"""Draft, under the name of the list of blocks; and what the store calls them."""
TOOK = b"seconds"
"""That they took."""


@dataclass(frozen=True, slots=True)
class ChosenLayer:
    """What was chosen for one layer, and what else there was."""

    name: str
    plan: LayerPlan | None
    """None: it isn't quantized."""
    num_bytes: int
    price: float
    """Foretold, in nats per token."""
    margin: Margin
    """Of its group."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen for all layers that were open."""

    plan: Plan
    layers: tuple[ChosenLayer, ...]
    budget: Budget
    average_bits: float
    """That were reached, of what the recipe counts."""
    divergence: float
    """Foretold: the sum of the prices, in nats per token. It leaves out what errors of two layers
    have in common, and what they do beyond second order."""
    seconds: float
    """That measuring prices took, or had taken."""

    def summary(self) -> dict[str, Any]:
        """Return what a report says of it, JSON-able."""
        return {
            "average_bits_asked": self.budget.average_bits,
            "average_bits": self.average_bits,
            "divergence": self.divergence,
            "seconds": self.seconds,
            "layers": [
                {
                    "name": row.name,
                    **({} if row.plan is None else row.plan.scheme.to_json()),
                    "bytes": row.num_bytes,
                    "price": row.price,
                    "gain": row.margin.gain,
                    "loss": row.margin.loss,
                }
                for row in self.layers
            ],
        }


def check_choices(source: ModelSource, recipe: Recipe, plan: Plan) -> None:
    """Refuse, before anything is read, what can't be chosen.

    Raises:
        RecipeError: the smallest choices take more than the budget, or there are none.
        SchemeError: a method doesn't have the bits of a choice.
    """
    if recipe.choosing is not None:
        budget_of(source, recipe.choosing, plan, open_layers(source, recipe, plan))


def choose(run: Run, writer: CheckpointWriter | None = None) -> Allocation | None:
    """Choose for all layers that the recipe leaves open.

    Args:
        run: Its plan has what the recipe says of all layers.
        writer: Keeps the prices for a run that goes on; None: this is no such run.

    Returns:
        The plan and its reasons; None: the recipe leaves nothing open.

    Raises:
        MethodError: see `measure_prices`.
        RecipeError: see `check_choices`.
    """
    section = run.recipe.choosing
    if section is None:
        return None
    layers = open_layers(run.source, run.recipe, run.plan)
    budget = budget_of(run.source, section, run.plan, layers)
    prices, seconds = _prices(run, section, layers, writer)
    priced = [
        PricedLayer(layer.name, layer.group, layer.num_bytes, prices[layer.name])
        for layer in layers
    ]
    chosen = allocate(priced, budget.open_bytes)
    return _explained(run, layers, priced, budget, chosen, seconds)


def _explained(
    run: Run,
    layers: Sequence[OpenLayer],
    priced: Sequence[PricedLayer],
    budget: Budget,
    chosen: dict[str, int],
    seconds: float,
) -> Allocation:
    worth = margins(priced, chosen)
    rows = []
    for layer, costs in zip(layers, priced, strict=True):
        place, name = chosen[layer.name], layer.name
        plan, size = layer.plans[place], layer.num_bytes[place]
        rows.append(ChosenLayer(name, plan, size, costs.prices[place], worth[name]))
    return Allocation(
        plan=chosen_plan(run.source, run.plan, layers, chosen),
        layers=tuple(rows),
        budget=budget,
        average_bits=budget.bits(sum(row.num_bytes for row in rows)),
        divergence=sum(row.price for row in rows),
        seconds=seconds,
    )


def _prices(
    run: Run,
    section: ChoosingSection,
    layers: Sequence[OpenLayer],
    writer: CheckpointWriter | None,
) -> tuple[Prices, float]:
    """Return prices and the seconds that they took; a resumed run has the writer's."""
    made = partial(_made, run, section, layers)
    if writer is None:
        values = made()
        return _read(values.tensors(PRICES)[PRICES], layers), values.notes["seconds"]
    name = run.source.adapter.blocks
    notes = writer.once(name, made, draft=PRICES)
    return _read(writer.tensors(name, draft=PRICES)[name], layers), notes["seconds"]


def _made(run: Run, section: ChoosingSection, layers: Sequence[OpenLayer]) -> Made:
    """Measure prices, unless the store has them of another run, with another budget perhaps."""
    with Store() as store:
        digest = _digest(run, section, layers)
        memo = Memo(store, PRICES, digest, lambda message: run.env.emit(Notice(message)))
        if TOOK not in memo:  # the last that is added
            started = time.perf_counter()
            for name, values in measure_prices(run, layers, section.tokens).items():
                memo.add(name.encode(), values)
            memo.add(TOOK, time.perf_counter() - started)
        seconds = memo[TOOK]
        flat = [price for layer in layers for price in memo[layer.name.encode()]]
    return Made(torch.tensor(flat, dtype=torch.float64), {"seconds": seconds})


def _read(flat: torch.Tensor, layers: Sequence[OpenLayer]) -> Prices:
    parts = flat.split([len(layer.plans) for layer in layers])
    names = (layer.name for layer in layers)
    return {name: tuple(part.tolist()) for name, part in zip(names, parts, strict=True)}


def _digest(run: Run, section: ChoosingSection, layers: Sequence[OpenLayer]) -> str:
    """Return a digest of all that decides prices: a budget doesn't."""
    decides: Mapping[str, object] = {
        **run.fingerprint(),
        "recipe": [section.tokens, run.recipe.seed],
        "choices": [[repr(plan) for plan in layer.plans] for layer in layers],
    }
    if run.recipe.fold is not None:
        decides = {
            **decides,
            "folded": run.recipe.model_copy(update={"choosing": None}).model_dump(mode="json"),
        }
    return hashlib.sha256(json_text(decides).encode()).hexdigest()[:32]
