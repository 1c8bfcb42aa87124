"""The step `search`: numbers of each layer, by the loss of the whole model; then the next layer.

Q-Rater (Kim et al. 2021, arXiv 2105.01868) is known here by its abstract: numbers for clipping and
for rounding, of weights and of activations, are explored by monitoring the task loss; the best of a
layer are frozen, and the search moves on to the next. All else is our design: the parametrisation,
the lists, the order of the numbers, errors of a block that spare most of the losses, samples of
their own that decide, and Optuna as another way.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtool.base import Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.choosing.search.stage import Stage
from qtool.choosing.search.trials import Judge, Trial, try_settings
from qtool.choosing.search.units import SearchUnit, Setting, search_units
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import Recipe
from qtool.recipe.search import SearchSection
from qtool.steps.plan import Plan
from qtool.steps.run import Run

SEARCHED, COMPARED = "searched", "compared"
"""Drafts: of a unit what was tried and taken; under the name of the blocks, start and end."""
SEARCHING = "searching"


@dataclass(frozen=True, slots=True)
class FoundUnit:
    """What was tried for a unit, and what was taken."""

    unit: SearchUnit
    setting: Setting
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def evaluations(self) -> int:
        """How many losses of the whole model were measured to choose, without those that decide."""
        return sum(trial.loss is not None for trial in self.trials)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search made of a plan."""

    plan: Plan
    units: tuple[FoundUnit, ...]
    start: float
    """KL to the original on the held-out samples with what the recipe says, in nats per token."""
    end: float
    """The same with what was taken."""
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return what a report says of it, JSON-able."""
        return {
            "start": self.start,
            "end": self.end,
            "evaluations": sum(each.evaluations for each in self.units),
            "block_evaluations": sum(len(each.trials) for each in self.units),
            "seconds": self.seconds,
            "found": {
                key: value
                for each in self.units
                for key, value in each.unit.shown(each.setting).items()
                if value is not None
            },
        }

    def lines(self) -> list[dict[str, Any]]:
        """Return all trials in order, JSON-able: of which unit, what was tried, how it did."""
        return [
            {
                "of": each.unit.name,
                "values": each.unit.shown(trial.setting),
                "error": trial.error,
                "loss": trial.loss,
                "taken": trial.setting == each.setting,
            }
            for each in self.units
            for trial in each.trials
        ]


def check_search(source: ModelSource, recipe: Recipe, plan: Plan) -> None:
    """Refuse, before anything is read, a search that has nothing to search.

    Raises:
        RecipeError: see `search_units`.
    """
    if recipe.search is not None:
        search_units(source, plan, recipe.search)


def search_layers(run: Run, writer: CheckpointWriter) -> Found | None:
    """Search the numbers that a recipe leaves to it, layer by layer.

    Args:
        run: Its plan has what the recipe says of all layers: where the search starts.
        writer: Keeps what was found, unit by unit, for a run that goes on.

    Returns:
        The plan and how it came about; None: the recipe has no such section.

    Raises:
        DataError: there are too few samples.
        MissingExtraError: see `try_settings`.
        RecipeError: see `search_units`.
    """
    section = run.recipe.search
    if section is None:
        return None
    units = search_units(run.source, run.plan, section)
    stage, found = Stage(run, section), []
    for number, unit in enumerate(units):
        made = partial(_searched, run, section, stage, unit, number)
        notes = writer.once(unit.name, made, draft=SEARCHED)
        found.append(_read(unit, notes))
        stage.freeze(unit, found[-1].setting)
        detail = f"{unit.name}  loss {notes['losses'][0]:.4f} -> {notes['losses'][1]:.4f}"
        run.env.emit(Progress(SEARCHING, number + 1, len(units), detail))
    compared = partial(_compared, stage, units, [each.setting for each in found])
    ends = writer.once(run.source.adapter.blocks, compared, draft=COMPARED)
    return _result(run, found, ends)


def _searched(
    run: Run, section: SearchSection, stage: Stage, unit: SearchUnit, number: int
) -> Made:
    """Try settings of a unit, and take the best if other samples agree."""
    started = time.perf_counter()
    judge = Judge(
        partial(stage.error, unit),
        lambda setting: float(stage.losses(unit, setting, held_out=False).mean()),
    )
    try_settings(unit, judge, section, run.env.seed + number)
    best, held_out = judge.best(), {}
    if best != unit.start:
        before, after = (stage.losses(unit, one, held_out=True) for one in (unit.start, best))
        held_out = {"before": before, "after": after}
        best = best if clearly_less(before, after) else unit.start
    notes = {
        "setting": best,
        "trials": [[trial.setting, trial.error, trial.loss] for trial in judge.trials()],
        "losses": [judge.losses[unit.start], judge.losses[best]],
        "seconds": time.perf_counter() - started,
    }
    return Made(held_out, notes)


def clearly_less(before: Tensor, after: Tensor) -> bool:
    """Return whether losses of the same samples fall by more than a standard error of their mean.

    Both are (samples,) float64, of two samples and more.
    """
    gain = before - after
    return bool(gain.mean() > gain.std() / len(gain) ** 0.5)


def _compared(stage: Stage, units: Sequence[SearchUnit], settings: Sequence[Setting]) -> Made:
    """Measure the whole model as the recipe says and as it was found: one may undo the other."""
    started = time.perf_counter()
    starts = [unit.start for unit in units]
    both = torch.stack([stage.final_losses(units, each) for each in (starts, settings)])
    start, end = both.mean(1).tolist()
    return Made(
        {"held_out": both},
        {"start": start, "end": end, "seconds": time.perf_counter() - started},
    )


def _read(unit: SearchUnit, notes: Mapping[str, Any]) -> FoundUnit:
    trials = (Trial(tuple(setting), error, loss) for setting, error, loss in notes["trials"])
    return FoundUnit(unit, tuple(notes["setting"]), tuple(trials), notes["seconds"])


def _result(run: Run, found: Sequence[FoundUnit], ends: Mapping[str, float]) -> Found:
    """Return the plan with what was found; as it was, if all in all that is worse."""
    start, end = ends["start"], ends["end"]
    if end > start:
        found = [replace(each, setting=each.unit.start) for each in found]
        end = start
    plans = {layer.name: layer for each in found for layer in each.unit.under(each.setting)}
    layers = tuple(plans.get(layer.name, layer) for layer in run.plan.layers)
    seconds = sum(each.seconds for each in found) + ends["seconds"]
    return Found(replace(run.plan, layers=layers), tuple(found), start, end, seconds)
