"""The sections `eval`, `bench` and `check` of a recipe: what is measured of a result. Torch-free.

They decide nothing of a checkpoint: that one doesn't record them, and another limit needs no other
run. See `without_measuring`.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from qtool.recipe.values import MOST_LENGTH, Name, Number, Section, Text, WholeNumber

Count = Annotated[WholeNumber, Field(ge=1, le=MOST_LENGTH)]
Length = Annotated[WholeNumber, Field(ge=2, le=MOST_LENGTH)]
MOST_LIMITS = 1000
MEASURING = ("model", "check", "eval", "bench", "gates")
"""Keys of a recipe that don't say what a checkpoint is."""


def _check_limit(value: object) -> object:
    """Refuse what is no limit; a union of types would say it in riddles."""
    numbers = value.values() if isinstance(value, Mapping) else [value]
    plain = all(
        isinstance(one, int | float) and not isinstance(one, bool) and isfinite(one)
        for one in numbers
    )
    if value is not None and not (plain and 0 < len(numbers) <= MOST_LIMITS):
        raise ValueError(
            "it should be a number, or numbers by what the gate is measured on, such as "
            "{text: 0.1, chats: 0.2}; null sets no limit"
        )
    return value


Limit = Annotated[float | Mapping[Name, float] | None, BeforeValidator(_check_limit)]
"""Of a gate: one number for all that it reads, or a number for each; None: none."""


class CheckSection(Section):
    """Budgets of the check after writing: the files are read again, and run beside the original."""

    max_kl: Annotated[Number, Field(gt=0)] | None = None
    """Nats per token, on the text and on the chats; null: any."""
    max_fallbacks: Annotated[WholeNumber, Field(ge=0)] | None = None
    """Layers that a solver may do more simply than asked; null: any number."""
    windows: Count | None = None
    """Of the text, and of the chats; null: 2 on a CPU, 8 on a card."""
    context_length: Length | None = None
    """Tokens of each; null: 512 on a CPU, 1024 on a card."""


class EvalSection(Section):
    """What of its quality is measured, as by `qtool eval`."""

    baseline: bool = True
    """Measure the original beside it, and how closely the result follows it."""
    dataset: Text | None = "wikitext2-test"
    """A bundled text, or the path of a .txt or .jsonl file; null: no text."""
    context_length: Length = 2048
    """Tokens of a window of the text."""
    windows: Count | None = None
    """The first ones only; null: all."""
    chats: Text | None = "dialogues-test"
    """Chats to compare on as well; null: none."""
    texts: bool = False
    """Also compare greedy continuations."""
    tasks: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    """Tasks or groups of lm-eval."""
    limit: Count | None = None
    """The first items of each task only; null: all."""
    num_fewshot: Annotated[WholeNumber, Field(ge=0, le=1000)] | None = None
    """Examples in the prompt; null: the customary number."""
    batch_size: Literal["auto"] | Count = "auto"
    """Requests per batch."""
    max_length: Length | None = None
    """Tokens of prompt and answer; null: what the model has positions for."""
    chat_template: bool = False
    """Put the prompts of tasks in the model's chat template."""


class BenchSection(Section):
    """What of its speed is measured, beside the original, as by `qtool bench`."""

    gpu: bool = False
    """The kernels of the card layer by layer, then decoding on them; else the model as
    transformers runs it."""
    backend: Name | None = None
    """Runs the quantized layers, without `gpu`; null: the one chosen."""
