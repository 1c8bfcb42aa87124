"""What is searched together: the numbers of linears that share an input, or of a block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from qtool.errors import RecipeError
from qtool.modeling.source import ModelSource
from qtool.recipe.search import SearchSection
from qtool.steps.plan import LayerPlan, Plan

Setting = tuple[float | None, ...]
"""A value of each number of a unit; None: what the recipe says."""
CLIP, ROUNDING = "clip_ratio", "rounding"
"""Fields of a method's options, and of an `ActivationScheme`."""


@dataclass(frozen=True, slots=True)
class Knob:
    """A number that is searched, and the same for linears that share an input."""

    layers: tuple[str, ...]
    key: str
    of_inputs: bool
    """Whose it is: the inputs', or the method's."""
    tried: tuple[float, ...]
    """Beside what the recipe says."""

    def changed(self, layer: LayerPlan, value: float | None) -> LayerPlan:
        """Return the plan of one of its layers with a value; None: as it is."""
        if value is None:
            return layer
        changes: dict[str, Any] = {self.key: value}
        if self.of_inputs:
            assert layer.activation is not None
            return replace(layer, activation=replace(layer.activation, **changes))
        return replace(layer, options=replace(layer.options, **changes))


@dataclass(frozen=True, slots=True)
class SearchUnit:
    """Layers of one block that are searched together, then frozen."""

    name: str
    block: int
    layers: tuple[LayerPlan, ...]
    knobs: tuple[Knob, ...]

    @property
    def start(self) -> Setting:
        """What the recipe says."""
        return (None,) * len(self.knobs)

    def under(self, setting: Setting) -> tuple[LayerPlan, ...]:
        """Return the plans of the layers with the values of a setting."""
        plans = {layer.name: layer for layer in self.layers}
        for knob, value in zip(self.knobs, setting, strict=True):
            for name in knob.layers:
                plans[name] = knob.changed(plans[name], value)
        return tuple(plans.values())

    def shown(self, setting: Setting) -> dict[str, float | None]:
        """Return a setting as a report has it, by the first layer of each number and its name."""
        pairs = zip(self.knobs, setting, strict=True)
        return {
            f"{knob.layers[0]}.{'activation_' * knob.of_inputs}{knob.key}": value
            for knob, value in pairs
        }


def search_units(source: ModelSource, plan: Plan, section: SearchSection) -> tuple[SearchUnit, ...]:
    """Return what is searched, in the order of execution.

    Raises:
        RecipeError: there is nothing to search.
    """
    together = section.method != "grid"
    found = []
    for place, layers in groupby(
        plan.in_blocks, lambda layer: _place(source, layer, together=together)
    ):
        unit = _unit(source, place, tuple(layers), section)
        if unit.knobs:
            found.append(unit)
    if not found:
        raise RecipeError(
            "search has nothing to search: no method of the recipe has the options clip_ratio or "
            "rounding, and no inputs are quantized. Leave it out, or give its lists values."
        )
    return tuple(found)


def _place(source: ModelSource, layer: LayerPlan, *, together: bool) -> tuple[int, str]:
    """Return the block of a layer, and the first linear of its group; '' for whole blocks."""
    number, _, inner = layer.name.removeprefix(source.adapter.blocks + ".").partition(".")
    if together:
        return int(number), ""
    return int(number), next(group[0] for group in source.adapter.linears if inner in group)


def _unit(
    source: ModelSource,
    place: tuple[int, str],
    layers: tuple[LayerPlan, ...],
    section: SearchSection,
) -> SearchUnit:
    by_input = groupby(layers, lambda layer: _place(source, layer, together=False))
    knobs = tuple(knob for _, group in by_input for knob in _knobs(tuple(group), section))
    name = ".".join(part for part in (source.adapter.blocks, str(place[0]), place[1]) if part)
    return SearchUnit(name, place[0], layers, knobs)


def _knobs(layers: Sequence[LayerPlan], section: SearchSection) -> Iterator[Knob]:
    """Yield the numbers of layers that share an input, in the order in which they are searched."""
    of_weights = {CLIP: section.clip_ratios, ROUNDING: section.roundings}
    of_inputs = {CLIP: section.activation_clip_ratios, ROUNDING: section.activation_roundings}
    for key, tried in of_weights.items():
        names = {layer.name: layer.options for layer in layers if _has(layer.options, key)}
        yield from _knob(names, key, tried, of_inputs=False)
    for key, tried in of_inputs.items():
        schemes = {layer.name: layer.activation for layer in layers if layer.activation is not None}
        yield from _knob(schemes, key, tried, of_inputs=True)


def _knob(
    owners: Mapping[str, Any], key: str, tried: Sequence[float], *, of_inputs: bool
) -> Iterator[Knob]:
    """Yield a number that some layers have, unless nothing but the recipe's value is tried."""
    said = {getattr(owner, key) for owner in owners.values()}
    others = tuple(value for value in tried if said != {value})
    if owners and others:
        yield Knob(tuple(owners), key, of_inputs, others)


def _has(options: object, key: str) -> bool:
    return key in {field.name for field in fields(options)}  # type: ignore[arg-type]
