"""Plan a run without reading a weight: which layers, which scheme, how many bytes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from qtool.checkpoint.manifest import num_bytes
from qtool.errors import ModelError, RecipeError
from qtool.formats._dtypes import item_bytes
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import Recipe, TableSection, WeightsSection
from qtool.scheme import GroupDim, InputScheme, Shape2D, WeightScheme
from qtool.steps.activation_ranges import known_scheme
from qtool.steps.beside import beside_linears, check_rest
from qtool.steps.check_fold import check_folded
from qtool.steps.method_choice import MethodChoice, methods_of
from qtool.steps.method_choice import load_method as load_method
from qtool.steps.request import Role, check_request, section_of
from qtool.steps.table_rows import expected_scheme, parts_of

IN_LIST = re.compile(r"\.experts\.\d+\.")
"""In the name of a linear that is one of a list of experts."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What will happen to one layer."""

    name: str
    role: Role
    shape: Shape2D
    scheme: WeightScheme
    method: str
    options: Any
    """Instance of the method's options dataclass."""
    num_bytes: int
    choose_group_dim: tuple[GroupDim, ...] = ()
    """Group dimensions to choose from by held-out error; empty: the scheme's."""
    choose_method: MethodChoice = ()
    """Methods to choose from likewise; empty: the one above."""
    row_bits: bytes = b""
    """Bits of each row, a byte each, once they are chosen; empty: all rows have the scheme's."""
    activation: InputScheme = None
    """How its inputs are quantized, as far as that is known without data."""

    def uniform(self, num_bits: int) -> "LayerPlan":
        """Return this plan with one width for all rows; `num_bytes` stays that of the whole."""
        return replace(self, scheme=self.scheme.uniform(num_bits), row_bits=b"")

    def alternatives(self) -> list["LayerPlan"]:
        """Return this plan with each method and scheme to choose from; the preferred one first."""
        dims = self.choose_group_dim or (self.scheme.group_dim,)
        return [
            replace(
                self, method=method, options=options, scheme=replace(self.scheme, group_dim=dim)
            )
            for method, options in self.methods
            for dim in dims
        ]

    @property
    def methods(self) -> MethodChoice:
        """Return all that it may be solved by; the preferred one first."""
        return self.choose_method or ((self.method, self.options),)

    def bytes_under(self, scheme: WeightScheme) -> int:
        """Return the stored size with a scheme: of the method that takes most, if they differ."""
        layouts = (
            parts_of(load_method(method), scheme, self.shape, options)
            for method, options in self.methods
        )
        return max(sum(map(num_bytes, layout.values())) for layout in layouts)

    @property
    def average_bits(self) -> float:
        """Stored bits per weight, with scales and offsets."""
        return 8 * self.num_bytes / prod(self.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """All layers to be quantized and all tensors to be copied, in order."""

    layers: tuple[LayerPlan, ...]
    tied_head: str | None
    """Name of the head if it shares the quantized embedding."""
    kept: tuple[str, ...]
    """Full names of the tensors that are copied unchanged."""
    kept_bytes: int
    source_bytes: int

    @property
    def in_blocks(self) -> Iterator[LayerPlan]:
        """The layers of the decoder blocks."""
        return (layer for layer in self.layers if layer.role == "block")

    @property
    def total_bytes(self) -> int:
        """Size of the weights of the checkpoint."""
        return self.kept_bytes + sum(layer.num_bytes for layer in self.layers)

    @property
    def average_bits(self) -> float:
        """Stored bits per quantized weight, with scales and offsets."""
        weights = sum(prod(layer.shape) for layer in self.layers)
        return 8 * sum(layer.num_bytes for layer in self.layers) / max(weights, 1)


def make_plan(source: ModelSource, recipe: Recipe) -> Plan:
    """Apply a recipe to a model; every option is checked here, before any weight is read.

    Raises:
        RecipeError: an option is wrong, or an override matches nothing.
        SchemeError: a method can't do the scheme.
        UnknownNameError: there is no such method.
        ModelError: much of the blocks can't be quantized, or what is to be folded can't be, or a
            stored name is in the way.
    """
    rest = beside_linears(source)
    check_request(recipe, source.adapter, tuple(source.block_linears()), tuple(rest))
    check_rest(source, recipe, rest)
    check_folded(source, recipe)
    layers = tuple(_layers(source, recipe))
    if recipe.calibration is not None:
        _check_lists(source, layers)
    if not layers:
        raise RecipeError("The recipe skips every layer: nothing is left to quantize.")
    return plan_of(source, layers)


def plan_of(source: ModelSource, layers: tuple[LayerPlan, ...]) -> Plan:
    """Return the plan that quantizes these layers, and copies all else.

    Raises:
        ModelError: a stored name is in the way.
    """
    tied = source.head_is_tied and any(layer.role == "embedding" for layer in layers)
    head = source.adapter.head
    replaced = [layer.name for layer in layers] + ([head] if tied else [])
    stored = {source.stored_name(f"{name}.weight") for name in replaced}
    kept = tuple(name for name in source.names() if source.stored_name(name) not in stored)
    if not any(f"{name}.weight" in source.experts for name in replaced):
        others = (name for name in kept if name not in source.experts)
        kept = tuple(sorted((*others, *source.stored_experts())))
    _check_names(source, layers, kept)
    return Plan(
        layers=layers,
        tied_head=head if tied else None,
        kept=kept,
        kept_bytes=sum(original_bytes(source, name) for name in kept),
        source_bytes=sum(original_bytes(source, name) for name in source.names()),
    )


def _check_lists(source: ModelSource, layers: tuple[LayerPlan, ...]) -> None:
    """Raise ModelError if experts stand in lists: what each of them sees isn't measured there."""
    listed = next((layer.name for layer in layers if IN_LIST.search(layer.name)), None)
    if listed is not None:
        raise ModelError(
            f"{source.directory}: {listed} is of an expert in a list, as transformers 4 keeps "
            "them, and calibration takes experts as transformers 5 has them. Install transformers "
            "5, or quantize without calibration data."
        )


def original_bytes(source: ModelSource, name: str) -> int:
    """Return what a tensor of the original takes, by its full name."""
    spec = source.spec(name)
    return prod(spec.shape) * item_bytes(spec.dtype)


def _check_names(source: ModelSource, layers: tuple[LayerPlan, ...], kept: tuple[str, ...]) -> None:
    """Raise ModelError if a tensor that is copied has the name of a quantized layer or its part."""
    ours = {layer.name for layer in layers}
    for layer in layers:
        for each in layer.alternatives():
            parts = parts_of(load_method(each.method), each.scheme, each.shape, each.options)
            ours |= {f"{layer.name}.{part}" for part in parts}
    taken = [name for name in kept if name in ours]
    if taken:
        raise ModelError(
            f"{source.directory}: a tensor is named {taken[0]}, as quantizing names what it writes "
            "for that layer. Rename it, or skip the layer with an override."
        )


def _layers(source: ModelSource, recipe: Recipe) -> Iterator[LayerPlan]:
    for name in source.block_linears():
        section = section_of(recipe, name, is_sensitive=source.is_sensitive(name))
        if section is not None:
            plan = _plan_layer(source, name, "block", section)
            yield replace(plan, activation=known_scheme(recipe))
    if recipe.embedding is not None:
        _check_table(source)
        yield _plan_layer(source, source.adapter.embedding, "embedding", recipe.embedding)
    if recipe.head is not None:
        if source.head_is_tied:
            raise RecipeError(
                "This model's head is tied to its embedding; quantize both with the section "
                "'embedding' and leave out 'head'."
            )
        yield _plan_layer(source, source.adapter.head, "head", recipe.head)


def _check_table(source: ModelSource) -> None:
    """Refuse an embedding that computes more than a row of its table: that would be lost."""
    plain = source.plain.get(f"{source.adapter.embedding}.weight")
    if plain is not None:
        raise RecipeError(
            f"{source.adapter.embedding} can't be quantized: {plain.why}. Leave out the section "
            "'embedding'."
        )


def _plan_layer(
    source: ModelSource, name: str, role: Role, section: WeightsSection | TableSection
) -> LayerPlan:
    choice = methods_of(section)
    scheme, shape = section.scheme.to_scheme(), source.weight_shape(name)
    if isinstance(section, TableSection) and section.rows is not None:
        scheme = expected_scheme(section.rows, scheme, shape)
    plan = LayerPlan(
        name=name,
        role=role,
        shape=shape,
        scheme=scheme,
        method=choice[0][0],
        options=choice[0][1],
        num_bytes=0,
        choose_group_dim=section.choose.group_dim if isinstance(section, WeightsSection) else (),
        choose_method=choice if len(choice) > 1 else (),
    )
    return replace(plan, num_bytes=plan.bytes_under(scheme))
