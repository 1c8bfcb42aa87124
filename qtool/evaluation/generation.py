"""How a model continues a prompt, where the user overrides what a task says.

Written as lm-eval's `--gen_kwargs`. Only what is sure to work is taken: lm-eval passes any name on,
and a mistake shows when the model is loaded and hours of other tasks are done, or never.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from qtool.errors import DataError
from qtool.evaluation.lm_eval_hooks import require_lm_eval

DRAWING = ("temperature", "top_p", "top_k", "min_p")
"""Without `do_sample=True` they change nothing."""

Check = Callable[[Any], Any]
"""Returns the value as transformers takes it, or None if it can't be one."""


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


def _checked(key: str, value: Any) -> Any:  # noqa: ANN401
    if key not in SETTINGS:
        near = " Write max_gen_toks." if key.startswith("max_") else ""
        near = " Write until." if key.startswith("stop") else near
        raise DataError(
            f"--gen-kwargs has no '{key}'.{near} It takes {', '.join(SETTINGS)}; lists as in "
            'until=["Q:","A:"].'
        )
    words, check = SETTINGS[key]
    checked = check(value)
    if checked is None:
        raise DataError(f"--gen-kwargs has {key}={value!r}, which must be {words}.")
    return checked


def _check_drawing(settings: Mapping[str, Any]) -> None:
    drawing = [key for key in DRAWING if key in settings]
    if settings.get("temperature") == 0:
        drawing.remove("temperature")
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


def _flag(value: Any) -> bool | None:  # noqa: ANN401
    return value if isinstance(value, bool) else None


def _number(low: float, high: float = inf) -> Check:
    def check(value: Any) -> float | None:  # noqa: ANN401
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if number and low <= value <= high and value != inf else None

    return check


def _whole(low: int) -> Check:
    def check(value: Any) -> int | None:  # noqa: ANN401
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value if whole and value >= low else None

    return check


def _texts(value: Any) -> list[str] | None:  # noqa: ANN401
    """Return texts; what begins like a list or a quotation and didn't parse as one is none.

    Nor is a backslash outside of one: it would stay a backslash, which no model writes.
    """
    texts = value if isinstance(value, list) else [value]
    broken = isinstance(value, str) and (
        value.startswith(("[", "(", "{", '"', "'")) or "\\" in value
    )
    fine = texts and all(isinstance(text, str) and text for text in texts)
    return texts if fine and not broken else None


SETTINGS: Mapping[str, tuple[str, Check]] = {
    "do_sample": ("True or False", _flag),
    "temperature": ("a number from 0", _number(0)),
    "top_p": ("a number from 0 to 1", _number(0, 1)),
    "min_p": ("a number from 0 to 1", _number(0, 1)),
    "top_k": ("a whole number from 0", _whole(0)),
    "repetition_penalty": ("a number from 0.01", _number(0.01)),
    "no_repeat_ngram_size": ("a whole number from 0", _whole(0)),
    "num_beams": ("a whole number from 1", _whole(1)),
    "max_gen_toks": ("a whole number from 1", _whole(1)),
    "until": (r'a text, or a list such as ["Q:","\n\n"]', _texts),
}
