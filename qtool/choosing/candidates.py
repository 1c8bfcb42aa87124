"""What there is to choose from: the layers whose bits are open, and a plan under each choice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, prod

from qtool.errors import RecipeError
from qtool.modeling.source import ModelSource
from qtool.recipe.choosing import Choice, ChoosingSection, scheme_changes
from qtool.recipe.schema import Recipe, fixes_scheme
from qtool.steps.method_choice import check_bits
from qtool.steps.plan import LayerPlan, Plan, original_bytes, plan_of

SHOWN = 1000
"""An average is shown in thousandths of a bit."""


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """A layer whose choice is open."""

    name: str
    group: str
    """Its block and the first of the linears that share an input: they take the same choice."""
    plans: tuple[LayerPlan | None, ...]
    """Under each choice; None: it isn't quantized."""
    num_bytes: tuple[int, ...]
    """Stored, under each choice."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the average of a recipe means in bytes."""

    num_weights: int
    """Of all that counts."""
    fixed_bytes: int
    """Of what counts and isn't open."""
    average_bits: float
    """That may be."""

    @property
    def open_bytes(self) -> int:
        """What the open layers may take together."""
        return floor(self.average_bits * self.num_weights / 8) - self.fixed_bytes

    def bits(self, open_bytes: int) -> float:
        """Return the average with so many bytes of open layers."""
        return 8 * (self.fixed_bytes + open_bytes) / self.num_weights


def open_layers(source: ModelSource, recipe: Recipe, plan: Plan) -> tuple[OpenLayer, ...]:
    """Return the layers that the recipe leaves open, neighbours where they share a choice.

    Raises:
        SchemeError: a method doesn't have the bits of a choice.
    """
    section = recipe.choosing
    assert section is not None
    return tuple(
        OpenLayer(layer.name, _group(source, layer), plans, _bytes(source, layer, plans))
        for layer in plan.layers
        if (plans := tuple(_planned(layer, one) for one in _choices(recipe, section, layer)))
    )


def budget_of(
    source: ModelSource, section: ChoosingSection, plan: Plan, layers: Sequence[OpenLayer]
) -> Budget:
    """Return what the layers may take.

    Raises:
        RecipeError: there is nothing to choose, or the smallest choices take more.
    """
    if not layers:
        raise RecipeError(
            "choosing has nothing to choose: weights.overrides give every layer a scheme."
        )
    everything = section.counts == "strict"
    planned = {layer.name: layer.num_bytes for layer in plan.layers}
    counted = list(source.block_linears())
    if everything:
        total, num_weights = plan.total_bytes, _num_weights(source, plan)
    else:
        kept = (name for name in counted if name not in planned)
        total = sum(planned.get(name, 0) for name in counted)
        total += sum(original_bytes(source, f"{name}.weight") for name in kept)
        num_weights = sum(prod(source.weight_shape(name)) for name in counted)
    fixed = total - sum(planned[layer.name] for layer in layers)
    budget = Budget(num_weights, fixed, section.average_bits)
    least = sum(min(layer.num_bytes) for layer in layers)
    if least > budget.open_bytes:
        nearest = ceil(SHOWN * budget.bits(least)) / SHOWN
        advice = "name smaller choices"
        if everything and any(name in plan.kept for name in _tables(source)):
            advice += ", give the recipe a section 'embedding' (and 'head')"
        raise RecipeError(
            f"choosing.average_bits is {section.average_bits:g}, and the smallest choices take "
            f"{nearest:g} ({_COUNTED[section.counts]}). Ask for {nearest:g} or more, or {advice}.",
            key="choosing.average_bits",
        )
    return budget


_COUNTED = {
    "blocks": "linears of the blocks, with scales and offsets",
    "strict": "the whole model, embedding and head included",
}


def chosen_plan(
    source: ModelSource, plan: Plan, layers: Sequence[OpenLayer], chosen: dict[str, int]
) -> Plan:
    """Return a plan with the choice, by place, of each open layer."""
    plans = {layer.name: layer.plans[chosen[layer.name]] for layer in layers}
    kept = (plans.get(layer.name, layer) for layer in plan.layers)
    return plan_of(source, tuple(layer for layer in kept if layer is not None))


def _choices(recipe: Recipe, section: ChoosingSection, layer: LayerPlan) -> tuple[Choice, ...]:
    """Return what a layer has to choose from; nothing if its scheme is settled.

    Rows of unlike bits are: what a table of them costs per average is for `tables` to say later.
    """
    if layer.role == "block":
        return () if fixes_scheme(recipe.weights, layer.name) else section.choices
    settled = section.counts == "blocks" or bool(layer.scheme.rows)
    return () if settled else section.tables


def _planned(layer: LayerPlan, choice: Choice) -> LayerPlan | None:
    """Return a layer's plan under a choice; None: it isn't quantized."""
    changes = scheme_changes(choice)
    if changes is None:
        return None
    scheme = replace(layer.scheme, **changes)
    said = f"choosing names {scheme.num_bits} bits"
    check_bits(layer.name, layer.methods, scheme.num_bits, said)
    dims = () if "group_dim" in changes else layer.choose_group_dim
    size = layer.bytes_under(scheme)
    return replace(layer, scheme=scheme, num_bytes=size, choose_group_dim=dims)


def _bytes(
    source: ModelSource, layer: LayerPlan, plans: Sequence[LayerPlan | None]
) -> tuple[int, ...]:
    as_it_is = original_bytes(source, f"{layer.name}.weight")
    return tuple(as_it_is if plan is None else plan.num_bytes for plan in plans)


def _group(source: ModelSource, layer: LayerPlan) -> str:
    if layer.role != "block":
        return layer.name
    depth = source.adapter.blocks.count(".") + 2
    parts = layer.name.split(".")
    block, linear = ".".join(parts[:depth]), ".".join(parts[depth:])
    first = next(group[0] for group in source.adapter.linears if linear in group)
    return f"{block}.{first}"


def _num_weights(source: ModelSource, plan: Plan) -> int:
    """Return how many values the model has; a tied head's are the embedding's."""
    table, head = (source.stored_name(name) for name in _tables(source))
    twice = head if plan.tied_head is not None and head != table else None
    names = (name for name in source.names() if source.stored_name(name) != twice)
    return sum(prod(source.spec(name).shape) for name in names)


def _tables(source: ModelSource) -> Iterator[str]:
    return (f"{name}.weight" for name in (source.adapter.embedding, source.adapter.head))
