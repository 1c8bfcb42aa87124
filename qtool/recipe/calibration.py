"""The section `calibration` of a recipe: which samples the solvers see. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from qtool.recipe.values import (
    MOST_LENGTH,
    MOST_TOKENS,
    Name,
    Number,
    Section,
    Text,
    WholeNumber,
)
from qtool.storage.plain_json import JsonValue

SLACK_OF_SHARES = 1e-6


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
    bias_correction: bool = False
    """Linears that have a bias take away the mean error of their outputs, where the error of the
    block's output falls on held-out samples."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """In which the blocks run; auto: on a card as stored, on a CPU in float32."""
    cache: Literal["memory", "disk"] = "memory"
    """Where the inputs of the next block wait."""
    prefix: Literal["linears", "block", "original"] = "linears"
    """Which model a linear's inputs come from: all linears before it are quantized; only those of
    the blocks before its own; none is."""
    chunks: Annotated[WholeNumber, Field(ge=1, le=1024)] | None = None
    """Parts of the samples whose sums are added up in float64: so many workers can share them;
    null: there is one, and with an engine 8."""
    part_rows: Annotated[WholeNumber, Field(ge=1, le=MOST_LENGTH)] | None = None
    """Rows of a linear that are solved as one problem, at most; null: all, and with an engine on a
    CPU 1024."""
    strict: bool = False
    """Fail where a solver would fall back to something simpler."""

    @model_validator(mode="before")
    @classmethod
    def _choose_sources(cls, values: JsonValue) -> JsonValue:
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

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.part_rows is not None and self.output_groups is not None:
            raise ValueError("output_groups divides the rows already; leave out part_rows")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.sequence_length != "match":
            for name in ("tasks", "num_tokens"):
                self.refuse_unread(name, needs="sequence_length match")
        return self

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
        if not self.bias_correction:
            values.pop("bias_correction", None)
        if self.prefix == "linears":
            values.pop("prefix", None)
        for name in ("chunks", "part_rows"):
            if getattr(self, name) is None:
                values.pop(name, None)
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
