"""The shape of a recipe: fixed optional sections, frozen, strict. An absent section doesn't run."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from qtool.recipe.activations import ActivationsSection
from qtool.recipe.choosing import ChoosingSection
from qtool.recipe.folding import FoldSection
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
from qtool.recipe.tuning import TuningSection
from qtool.recipe.values import (
    MOST_LENGTH,
    MOST_SEED,
    MOST_TOKENS,
    Name,
    Number,
    Section,
    Text,
    WholeNumber,
)
from qtool.scheme import GroupDim

SLACK_OF_SHARES = 1e-6


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


class SourceSection(Section):
    """A part of a mixture."""

    dataset: Text
    """As `calibration.dataset`."""
    share: Annotated[Number, Field(gt=0, le=1)]
    """Of the samples."""
    rendering: Annotated[Literal["text", "chat"] | None, Field(alias="as")] = None
    """`text`: chats as plain text; `chat`: in the model's template, which it has to have; null: in
    the template if there is one."""


MIXTURE = (
    {"dataset": "wikitext2-valid", "share": 0.26},
    {"dataset": "prose", "share": 0.17},
    {"dataset": "dialogues", "share": 0.22},
    {"dataset": "gsm8k-train", "share": 0.17},
    {"dataset": "source-code", "share": 0.09},
    {"dataset": "languages", "share": 0.09},
)
"""The bundled mixture: encyclopedic text, prose, chats, mathematics, code, other languages."""


class CalibrationSection(Section):
    """Which samples the solvers see."""

    dataset: Text | None = None
    """In place of a mixture: a bundled text, the path of a .txt, .jsonl or .jsonl.gz file, or
    hub:NAME:CONFIG:SPLIT."""
    mixture: Annotated[tuple[SourceSection, ...], Field(max_length=100)] = ()
    """Sources and their shares; without a dataset the default is what qtool ships."""
    num_samples: Annotated[WholeNumber, Field(ge=2, le=MOST_LENGTH)] = 64
    sequence_length: (
        Literal["match", "fixed"] | Annotated[WholeNumber, Field(ge=2, le=MOST_LENGTH)]
    ) = "fixed"
    """Tokens per sample; 'match': as the prompts of `tasks` have them (SLAC); 'fixed': 2048, or as
    many as the model has positions for."""
    tasks: Annotated[tuple[Name, ...], Field(max_length=100)] = ()
    """Tasks whose prompt lengths are matched: gsm8k, humaneval, mmlu."""
    num_tokens: Annotated[WholeNumber, Field(ge=16, le=MOST_TOKENS)] = 131072
    """With 'match': about how many tokens all samples hold, whatever their lengths."""
    holdout: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Fraction of the samples that every choice is made on."""
    token_cap: Annotated[Number, Field(ge=1, le=1e6)] | None = None
    """Tokens are shrunk to this multiple of the median norm before they enter a Hessian; null: they
    aren't."""
    input_error: Literal["auto"] | Annotated[Number, Field(ge=0, le=1)] = "auto"
    """Share of the upstream error that a layer compensates; auto: chosen per layer."""
    output_groups: Annotated[WholeNumber, Field(ge=1, le=64)] | None = None
    """Groups of output channels of a linear, each solved with tokens weighed by the gradients of
    the loss of the original with respect to them; null: all tokens count alike."""
    residual_error: bool = True
    """Linears that add to the residual stream also compensate the error that it carries."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """In which the blocks run; auto: on a card as stored, on a CPU in float32."""
    cache: Literal["memory", "disk"] = "memory"
    """Where the inputs of the next block wait."""
    strict: bool = False
    """Fail where a solver would fall back to something simpler."""

    @model_validator(mode="before")
    @classmethod
    def _choose_sources(cls, values: Any) -> Any:  # noqa: ANN401
        """Take the bundled mixture where nothing else is named; null names nothing."""
        if not isinstance(values, Mapping):
            return values
        named = ("dataset", "mixture")
        given = {
            key: value for key, value in values.items() if key not in named or value is not None
        }
        if all(name in given for name in named):
            raise ValueError(
                "dataset and mixture both say where the samples come from; give one, and set the "
                "other to null"
            )
        if not given.get("mixture", named):
            raise ValueError("mixture is empty; name its sources, or leave it out")
        return given if "dataset" in given else {"mixture": MIXTURE, **given}

    @field_validator("mixture")
    @classmethod
    def _check_shares(cls, value: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        total = sum(source.share for source in value)
        if value and abs(total - 1) > SLACK_OF_SHARES:
            raise ValueError(f"the shares must add up to 1, and add up to {total:.10g}")
        return value

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the one of dataset and mixture that holds."""
        values: dict[str, Any] = handler(self)
        values.pop("mixture" if self.dataset is not None else "dataset", None)
        if self.output_groups is None:
            values.pop("output_groups", None)
        for source in values.get("mixture", ()):
            if (rendering := source.pop("rendering", None)) is not None:
                source["as"] = rendering
        return values

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """All that the samples come from."""
        if self.dataset is None:
            return self.mixture
        return (SourceSection(dataset=self.dataset, share=1.0),)


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
    def _drop_gates(cls, value: Any) -> Any:  # noqa: ANN401
        """Leave out gates without a limit, so that a recipe can lift those that it extends."""
        if isinstance(value, Mapping):
            return {name: limit for name, limit in value.items() if limit is not None}
        return {} if value is None else value

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out sections that came later, where they are absent."""
        values: dict[str, Any] = handler(self)
        for name in ("activations", "choosing", "fold", "search", *MEASURING):
            if values.get(name) is None or (name == "gates" and not self.gates):
                values.pop(name, None)
        return values

    def without_measuring(self) -> "Recipe":
        """Return what decides a checkpoint: all but what is measured of it, and its limits."""
        return self.model_copy(update={**dict.fromkeys(MEASURING), "gates": {}})


def resolve(weights: WeightsSection, layer: str) -> WeightsSection | None:
    """Return the section that holds for one layer, None if it is skipped; overrides applied."""
    for override in weights.overrides:
        if not fnmatchcase(layer, override.match):
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
        if fnmatchcase(layer, override.match):
            return override.skip or bool(override.scheme)
    return False
