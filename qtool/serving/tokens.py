"""What goes into the batch and what comes out: numbers of tokens, no text."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length"]
"""Why a sequence has ended: a token or a text that ends it, or there was no room for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is taken from the logits."""

    temperature: float = 1.0
    """0: the likeliest."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Of the random numbers; None: other ones each time."""
    top_logprobs: int | None = None
    """Return log-probabilities, and of how many others; None: none."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One sequence to be continued."""

    key: Hashable
    """Names it in what comes back."""
    prompt: Sequence[int]
    """One token at least."""
    max_tokens: int
    """Of the answer, one at least; with the prompt no more than the decoder has room for."""
    stop_ids: frozenset[int]
    """Tokens that end it."""
    sampling: SamplingOptions


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was before temperature and top-p."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, falling."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of a sequence, its last one if `finish` says so."""

    key: Hashable
    token: int
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """A sequence can't go on."""

    key: Hashable
    message: str


Event = TokenEvent | FailureEvent
