"""The shape of a recipe: fixed optional sections, frozen, strict. An absent section doesn't run."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from qtool.recipe.activations import ActivationsSection
from qtool.recipe.calibration import CalibrationSection
from qtool.recipe.choosing import ChoosingSection
from qtool.recipe.folding import FoldSection
from qtool.recipe.matching import matches
from qtool.recipe.measuring import (
    MEASURING,
    BenchSection,
    CheckSection,
    EvalSection,
    Limit,
)
from qtool.recipe.rows import RowsSection
from qtool.recipe.schemes import SchemeSection, check_scheme_keys
from qtool.recipe.search import SearchSection
from qtool.recipe.training import TrainingSection
from qtool.recipe.tuning import TuningSection
from qtool.recipe.values import (
    MOST_SEED,
    Name,
    Section,
    Text,
    WholeNumber,
)
from qtool.scheme import GroupDim
from qtool.storage.plain_json import JsonValue

LATER = ("training", *MEASURING)
"""Keys that say what is done with a checkpoint, not what it is."""


class Override(Section):
    """What differs for the layers whose dotted name matches."""

    match: Text
    """Glob on the layer's dotted name, such as '*.down_proj'; the first match wins."""
    skip: bool = False
    """Leave these layers in 16 bit."""
    method: Name | None = None
    scheme: Mapping[str, Any] = {}
    """Keys of `weights.scheme` that differ."""
    options: Mapping[str, Any] = {}
    """Keys of `weights.options` that differ; replaces them all if the method differs."""

    @field_validator("scheme")
    @classmethod
    def _check_scheme(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        return check_scheme_keys(value)


class ChooseSection(Section):
    """What qtool chooses per layer, by the error of its output on held-out samples."""

    group_dim: Annotated[tuple[GroupDim, ...], Field(max_length=2)] = ()
    """Group dimensions to try; the first is kept unless another is better by one percent."""
    method: Annotated[tuple[Name, ...], Field(max_length=8)] = ()
    """Methods to try, `weights.method` first; that is kept unless another is better by one percent.
    Each takes of `weights.options` those that it knows."""

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later, where it is absent."""
        values: dict[str, Any] = handler(self)
        if not self.method:
            values.pop("method", None)
        return values


class WeightsSection(Section):
    """How the linear layers of the decoder blocks are quantized."""

    method: Name
    scheme: SchemeSection = SchemeSection()
    options: Mapping[str, Any] = {}
    """Options of the method; `qtool methods` lists them."""
    choose: ChooseSection = ChooseSection()
    overrides: tuple[Override, ...] = ()


class TableSection(Section):
    """How the embedding or the head is quantized."""

    method: Name = "rtn"
    scheme: SchemeSection = SchemeSection(num_bits=8, group_size=64)
    options: Mapping[str, Any] = {}
    rows: RowsSection | None = None
    """Bits by the frequency of tokens, in place of the scheme's; absent: all rows have these."""

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is absent: recipes in older checkpoints don't have it."""
        values: dict[str, Any] = handler(self)
        if self.rows is None:
            values.pop("rows", None)
        return values


class Recipe(Section):
    """All that decides a run but model, device and paths."""

    version: Literal[1] = 1
    description: Text = ""
    calibration: CalibrationSection | None = None
    """Absent: solvers work without data."""
    fold: FoldSection | None = None
    """Absent: weights are as they are."""
    weights: WeightsSection
    activations: ActivationsSection | None = None
    """Absent: the inputs of linears stay in 16 bit."""
    tuning: TuningSection = TuningSection()
    """Absent: nothing is learned."""
    choosing: ChoosingSection | None = None
    """Absent: every layer has the bits of `weights`."""
    search: SearchSection | None = None
    """Absent: every layer has the options of `weights`."""
    embedding: TableSection | None = None
    """Absent: the embedding stays in 16 bit. With tied weights it covers the head."""
    head: TableSection | None = None
    """Absent: the head stays in 16 bit."""
    seed: Annotated[WholeNumber, Field(ge=0, le=MOST_SEED)] = 0
    training: TrainingSection | None = None
    """How `qtool train` goes on; other commands leave it aside."""
    model: Text | None = None
    """What `qtool run` quantizes where the command line names nothing."""
    check: CheckSection | None = None
    """Absent: the check after writing warns, and fails nothing."""
    eval: EvalSection | None = None
    """Absent: `qtool run` measures no quality."""
    bench: BenchSection | None = None
    """Absent: it measures no speed."""
    gates: Mapping[Name, Limit] = {}
    """Limits by the name of a gate."""

    @field_validator("gates", mode="before")
    @classmethod
    def _drop_gates(cls, value: JsonValue) -> JsonValue:
        """Leave out gates without a limit, so that a recipe can lift those that it extends."""
        if isinstance(value, Mapping):
            return {name: limit for name, limit in value.items() if limit is not None}
        return {} if value is None else value

    @model_validator(mode="after")
    def _check_biases(self) -> "Recipe":
        corrects = self.calibration is not None and self.calibration.bias_correction
        if corrects and self.tuning.end_to_end is not None:
            raise ValueError(
                "calibration.bias_correction and tuning.end_to_end both change biases; end-to-end "
                "tuning learns them by gradients: leave bias_correction out"
            )
        return self

    @model_validator(mode="after")
    def _check_self_written(self) -> "Recipe":
        tuning, samples = self.tuning.end_to_end, self.calibration
        named = samples is not None and samples.dataset is not None
        if named and tuning is not None and tuning.self_written not in ("auto", 0):
            raise ValueError(
                "tuning.end_to_end.self_written adds to a mixture, and calibration.dataset is one "
                "text: name that in calibration.mixture, or leave self_written out"
            )
        return self

    @model_validator(mode="after")
    def _check_prefix(self) -> "Recipe":
        """Refuse what works on a block as it is quantized, where linears see another."""
        section = self.calibration
        if section is None or section.prefix == "linears":
            return self
        wants = {
            "tuning.blocks": self.tuning.blocks is not None,
            "calibration.bias_correction": section.bias_correction,
        }
        for key, is_asked in wants.items():
            if is_asked:
                raise ValueError(
                    f"{key} goes on with a block whose linears are quantized, and with "
                    f"calibration.prefix '{section.prefix}' the walk has none: set prefix to "
                    f"'linears', or leave {key} out"
                )
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out sections that came later, where they are absent."""
        values: dict[str, Any] = handler(self)
        for name in ("activations", "choosing", "fold", "search", *LATER):
            if values.get(name) is None or (name == "gates" and not self.gates):
                values.pop(name, None)
        return values

    def without_measuring(self) -> "Recipe":
        """Return what decides a checkpoint: all but what is done with it, and its limits."""
        return self.model_copy(update={**dict.fromkeys(LATER), "gates": {}})


def resolve(weights: WeightsSection, layer: str) -> WeightsSection | None:
    """Return the section that holds for one layer, None if it is skipped; overrides applied."""
    for override in weights.overrides:
        if not matches(layer, override.match):
            continue
        if override.skip:
            return None
        other_method = override.method not in (None, weights.method)
        options = {} if other_method else dict(weights.options)
        return WeightsSection(
            method=override.method or weights.method,
            scheme=SchemeSection(**{**weights.scheme.model_dump(), **override.scheme}),
            options={**options, **override.options},
            choose=ChooseSection(
                group_dim=() if "group_dim" in override.scheme else weights.choose.group_dim,
                method=weights.choose.method if override.method is None else (),
            ),
        )
    return weights


def fixes_scheme(weights: WeightsSection, layer: str) -> bool:
    """Return whether an override says itself what a layer's scheme is, so that none is chosen."""
    for override in weights.overrides:
        if matches(layer, override.match):
            return override.skip or bool(override.scheme)
    return False


def is_named(weights: WeightsSection, layer: str) -> bool:
    """Return whether an override holds for a layer."""
    return any(matches(layer, override.match) for override in weights.overrides)
