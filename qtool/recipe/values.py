"""What sections of a recipe are made of: their base, and the kinds of values. Torch-free."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qtool.wording import quoted

MOST_TOKENS = 1 << 26
MOST_LENGTH = 1 << 20
"""Tokens of a sample, samples, or weights of a group: more is a slip of the keyboard."""
MOST_SEED = 2**32 - 1
"""What every generator takes, numpy's too."""


def _keep_bool_out(value: object) -> object:
    """Refuse YAML booleans where a number is meant (pydantic would read true as 1)."""
    if isinstance(value, bool):
        raise ValueError("is a boolean; a number is meant")
    return value


WholeNumber = Annotated[int, BeforeValidator(_keep_bool_out)]
Number = Annotated[float, BeforeValidator(_keep_bool_out), Field(allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=100)]
Text = Annotated[str, Field(max_length=4096)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def refuse_unread(self, name: str, *, needs: str) -> None:
        """Refuse a key that was set and that nothing reads; `needs` says when it would be read.

        Raises:
            ValueError: it has another value than by default.
        """
        both = getattr(self, name), type(self).model_fields[name].default
        value, default = (list(one) if isinstance(one, tuple) else one for one in both)
        if value != default:
            raise ValueError(
                f"{name}, {quoted(value)}, is read with {needs} only: set that, or leave {name} "
                f"at {quoted(default)}"
            )
