"""What is asked of lm-eval, and how a model continues a prompt where the user overrides a task.

The latter is written as lm-eval's `--gen_kwargs`. Only what is sure to work is taken: lm-eval
passes any name on, and a mistake shows when hours of other tasks are done, or never.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from qtool.errors import DataError
from qtool.evaluation.lm_eval.hooks import require_lm_eval
from qtool.storage.plain_json import JsonValue

AUTO = "auto"
SEEDS = (0, 1234, 1234, 1234)
"""Of python, numpy, torch and the choice of examples: lm-eval's own."""
DRAWING = ("temperature", "top_p", "top_k", "min_p")
"""Without `do_sample=True` they change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What is run, and how."""

    tasks: tuple[str, ...]
    """Tasks, groups or tags of lm-eval."""
    data_dir: Path | None = None
    """Folder of local data; None: lm-eval downloads."""
    num_fewshot: int | None = None
    """Examples in the prompt; None: the customary number, else lm-eval's."""
    limit: int | None = None
    """The first items of each task only."""
    batch_size: int | str = AUTO
    """Requests per batch, or "auto": as many as `batches` says, and one window of whole texts."""
    max_length: int | None = None
    """Tokens of prompt and answer; None: as many as the model has positions."""
    chat_template: bool = False
    """Put the prompts in the model's chat template."""
    seed: int | None = None
    """Of everything; None: lm-eval's seeds."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """How a model continues prompts, from `parse_generation`; else as each task says."""
    confirm_unsafe: bool = False
    """Run programs that the model writes."""
    cache: bool = True
    """Keep answers and scores, and use those that are kept."""
    samples: Path | None = None
    """Where what was asked and answered goes, one row per item and model."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of python, numpy, torch and the choice of examples."""
        return SEEDS if self.seed is None else (self.seed,) * len(SEEDS)


def parse_generation(text: str) -> dict[str, Any]:
    """Return the settings in KEY=VALUE,KEY=VALUE.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: it isn't written so, a name is unknown, a value isn't one of that name, or the
            settings contradict each other.
    """
    require_lm_eval()
    from lm_eval._cli.utils import key_val_to_dict

    try:
        values = {key.strip(): value for key, value in key_val_to_dict(text).items()}
        if not values:
            raise ValueError("it says nothing")
    except ValueError as error:
        raise DataError(
            f"--gen-kwargs is {text!r}: {error}. Write it as in do_sample=True,temperature=0.8."
        ) from error
    settings = {key: _checked(key, value) for key, value in values.items()}
    if settings.get("temperature") == 0:
        settings.setdefault("do_sample", False)
    _check_drawing(settings)
    return settings


def _checked(key: str, value: JsonValue) -> JsonValue:
    if key not in SETTINGS:
        near = " Write max_gen_toks." if key.startswith("max_") else ""
        near = " Write until." if key.startswith("stop") else near
        raise DataError(
            f"--gen-kwargs has no '{key}'.{near} It takes {', '.join(SETTINGS)}; lists as in "
            'until=["Q:","A:"].'
        )
    words, kind = SETTINGS[key]
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        raise DataError(f"--gen-kwargs has {key}={value!r}, which must be {words}.") from None


def _check_drawing(settings: Mapping[str, Any]) -> None:
    cold = settings.get("temperature") == 0
    drawing = [key for key in DRAWING if key in settings and not (cold and key == "temperature")]
    if settings.get("do_sample"):
        if not settings.get("temperature"):
            raise DataError(
                "--gen-kwargs has do_sample=True without a temperature above 0. Add temperature=1, "
                "or what you want."
            )
    elif drawing:
        raise DataError(
            f"--gen-kwargs has {', '.join(drawing)}, which count only where tokens are drawn. Add "
            "do_sample=True and a temperature above 0 to draw them."
        )


def _parsed(text: str) -> str:
    """Refuse a text that begins like a list or a quotation and didn't parse as one.

    Nor is a backslash taken outside of one: it would stay a backslash, which no model writes.
    """
    if text.startswith(("[", "(", "{", '"', "'")) or "\\" in text:
        raise ValueError("it isn't written as a list")
    return text


_Text = Annotated[str, Field(min_length=1)]
_Stops = Annotated[
    list[_Text] | Annotated[_Text, AfterValidator(_parsed)],
    Field(min_length=1),
    AfterValidator(lambda value: value if isinstance(value, list) else [value]),
]


_COUNT = ("a whole number from 0", Annotated[int, Field(ge=0)])
_POSITIVE = ("a whole number from 1", Annotated[int, Field(ge=1)])
_SHARE = ("a number from 0 to 1", Annotated[float, Field(ge=0, le=1)])
_Finite = Annotated[float, Field(allow_inf_nan=False)]
SETTINGS: Mapping[str, tuple[str, Any]] = {
    "do_sample": ("True or False", bool),
    "temperature": ("a number from 0", Annotated[_Finite, Field(ge=0)]),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_k": _COUNT,
    "repetition_penalty": ("a number from 0.01", Annotated[_Finite, Field(ge=0.01)]),
    "no_repeat_ngram_size": _COUNT,
    "num_beams": _POSITIVE,
    "max_gen_toks": _POSITIVE,
    "until": (r'a text, or a list such as ["Q:","\n\n"]', _Stops),
}
