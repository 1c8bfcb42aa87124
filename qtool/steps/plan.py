"""Plan a run without reading a weight: which layers, which scheme, how many bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

import qtool.methods
from qtool import plugins
from qtool.base import Method, ModelAdapter
from qtool.checkpoint.manifest import num_bytes
from qtool.errors import ModelError, RecipeError, SchemeError
from qtool.formats._dtypes import item_bytes
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import CalibrationSection, Recipe, TableSection, WeightsSection, resolve
from qtool.scheme import ActivationScheme, GroupDim, Shape2D, WeightScheme
from qtool.steps.activation_ranges import check_inputs, has_static_inputs, known_scheme
from qtool.steps.beside import beside_linears, check_rest
from qtool.steps.check_fold import check_fold, check_folded
from qtool.steps.options import read_options
from qtool.steps.table_rows import check_rows, expected_scheme, parts_of

Role = Literal["block", "embedding", "head"]


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
    row_bits: bytes = b""
    """Bits of each row, a byte each, once they are chosen; empty: all rows have the scheme's."""
    activation: ActivationScheme | None = None
    """How its inputs are quantized; None: they aren't, or how is found on what it sees."""

    def uniform(self, num_bits: int) -> "LayerPlan":
        """Return this plan with one width for all rows; `num_bytes` stays that of the whole."""
        return replace(self, scheme=self.scheme.uniform(num_bits), row_bits=b"")

    def alternatives(self) -> list["LayerPlan"]:
        """Return this plan with each scheme to choose from; the preferred one first."""
        dims = self.choose_group_dim or (self.scheme.group_dim,)
        return [replace(self, scheme=replace(self.scheme, group_dim=dim)) for dim in dims]

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


def load_method(name: str) -> Method:
    """Return a method by name."""
    return plugins.load(qtool.methods, name, "METHOD", Method)


def parse_options(method_name: str, method: Method, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the method's options.

    Raises:
        RecipeError: unknown key, wrong type or impossible value.
    """
    return read_options(method_name, method.options, values, "weights.options")


def with_samples(recipe: Recipe) -> Recipe:
    """Return the recipe with default samples, if its method does better with data or it tunes."""
    overridden = (override.method for override in recipe.weights.overrides)
    names = {recipe.weights.method, *(name for name in overridden if name is not None)}
    methods = [load_method(name) for name in sorted(names)]
    counts = any(table is not None and table.rows for table in (recipe.embedding, recipe.head))
    sections = (recipe.choosing, recipe.fold, recipe.search)
    learns = recipe.tuning.is_on or any(section is not None for section in sections)
    sees = counts or learns or has_static_inputs(recipe)
    wanted = sees or any(method.needs | method.uses for method in methods)
    if recipe.calibration is not None or not wanted:
        return recipe
    return recipe.model_copy(update={"calibration": CalibrationSection()})


def check_request(
    recipe: Recipe, adapter: ModelAdapter, linears: Sequence[str], others: Sequence[str]
) -> None:
    """Check what the names of the layers decide: found before the model is built.

    Linears and others are the dotted names of all linears of the decoder blocks, and of what else
    these are made of, which an override may skip.

    Raises:
        RecipeError: an option is wrong, an override matches nothing, or a method lacks its data.
        SchemeError: a method doesn't have the bits.
        UnknownNameError: there is no such method.
    """
    _check_overrides(recipe, linears, others)
    if recipe.calibration is None and recipe.weights.choose.group_dim:
        raise RecipeError("weights.choose needs calibration data to choose by.")
    for section, is_there, purpose in (
        ("tuning", recipe.tuning.is_on, "to learn from"),
        ("choosing", recipe.choosing is not None, "to tell what bits are worth"),
        ("search", recipe.search is not None, "to measure losses on"),
    ):
        if is_there and recipe.calibration is None:
            raise RecipeError(
                f"{section} needs calibration data {purpose}. Give the recipe a section "
                "'calibration', or leave out --no-calibration."
            )
    check_inputs(recipe)
    check_fold(recipe, adapter)
    blocks = ((name, "block", resolve(recipe.weights, name)) for name in linears)
    tables = (
        (adapter.embedding, "embedding", recipe.embedding),
        (adapter.head, "head", recipe.head),
    )
    for name, role, layer in (*blocks, *tables):
        if layer is not None:
            _check_section(name, role, layer, calibrated=recipe.calibration is not None)


def _check_section(
    name: str, role: str, section: WeightsSection | TableSection, *, calibrated: bool
) -> None:
    method = load_method(section.method)
    if section.scheme.num_bits not in method.num_bits:
        raise SchemeError(
            f"{name}: num_bits is {section.scheme.num_bits}; '{section.method}' takes "
            f"{method.num_bits.start} to {method.num_bits.stop - 1}.",
            layer=name,
        )
    options = parse_options(section.method, method, section.options)
    if isinstance(section, TableSection) and section.rows is not None:
        check_rows(name, section, method, options, calibrated=calibrated)
    if method.needs and role != "block":
        raise RecipeError(
            f"{name}: '{section.method}' needs calibration data, and an {role} is "
            "quantized without. Use 'rtn' or 'bcq' for it.",
            layer=name,
        )
    if method.needs and not calibrated:
        raise RecipeError(
            f"{name}: '{section.method}' needs calibration data. Give the recipe a section "
            "'calibration' (an empty one draws from the bundled text), or pass "
            "--calibration DIR.",
            layer=name,
        )


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
    _check_names(source, layers, kept)
    return Plan(
        layers=layers,
        tied_head=head if tied else None,
        kept=kept,
        kept_bytes=sum(original_bytes(source, name) for name in kept),
        source_bytes=sum(original_bytes(source, name) for name in source.names()),
    )


def original_bytes(source: ModelSource, name: str) -> int:
    """Return what a tensor of the original takes, by its full name."""
    spec = source.spec(name)
    return prod(spec.shape) * item_bytes(spec.dtype)


def _check_names(source: ModelSource, layers: tuple[LayerPlan, ...], kept: tuple[str, ...]) -> None:
    """Raise ModelError if a tensor that is copied has the name of a quantized layer or its part."""
    ours = {layer.name for layer in layers}
    for layer in layers:
        parts = parts_of(load_method(layer.method), layer.scheme, layer.shape, layer.options)
        ours |= {f"{layer.name}.{part}" for part in parts}
    taken = [name for name in kept if name in ours]
    if taken:
        raise ModelError(
            f"{source.directory}: a tensor is named {taken[0]}, as quantizing names what it writes "
            "for that layer. Rename it, or skip the layer with an override."
        )


def _check_overrides(recipe: Recipe, names: Sequence[str], others: Sequence[str]) -> None:
    for number, override in enumerate(recipe.weights.overrides):
        known = (*names, *others) if override.skip else names
        if not any(fnmatchcase(name, override.match) for name in known):
            raise RecipeError(
                f"weights.overrides.{number}.match is {override.match!r}, which matches none of "
                f"the {len(names)} layers; the first is {names[0]}."
            )


def _layers(source: ModelSource, recipe: Recipe) -> Iterator[LayerPlan]:
    for name in source.block_linears():
        section = resolve(recipe.weights, name)
        if section is not None:
            plan = _plan_layer(source, name, "block", section)
            yield replace(plan, activation=known_scheme(recipe))
    if recipe.embedding is not None:
        yield _plan_layer(source, source.adapter.embedding, "embedding", recipe.embedding)
    if recipe.head is not None:
        if source.head_is_tied:
            raise RecipeError(
                "This model's head is tied to its embedding; quantize both with the section "
                "'embedding' and leave out 'head'."
            )
        yield _plan_layer(source, source.adapter.head, "head", recipe.head)


def _plan_layer(
    source: ModelSource, name: str, role: Role, section: WeightsSection | TableSection
) -> LayerPlan:
    method = load_method(section.method)
    scheme, shape = section.scheme.to_scheme(), source.weight_shape(name)
    options = parse_options(section.method, method, section.options)
    if isinstance(section, TableSection) and section.rows is not None:
        scheme = expected_scheme(section.rows, scheme, shape)
    return LayerPlan(
        name=name,
        role=role,
        shape=shape,
        scheme=scheme,
        method=section.method,
        options=options,
        num_bytes=sum(map(num_bytes, parts_of(method, scheme, shape, options).values())),
        choose_group_dim=section.choose.group_dim if isinstance(section, WeightsSection) else (),
    )
