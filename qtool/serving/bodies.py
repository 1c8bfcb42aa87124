"""The bodies of requests as OpenAI's API has them.

What would change an answer is known, or refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_ANSWERS, MOST_STOPS, MOST_TOP_LOGPROBS = 128, 16, 20
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]


def _check_zero(value: float) -> float:
    if value:
        raise ValueError("this server doesn't have that; leave it out, or send 0.")
    return value


Zero = Annotated[float, AfterValidator(_check_zero)]
Stops = Annotated[list[str], Field(max_length=MOST_STOPS)]


class _Body(BaseModel):
    """Reads what is known; names that aren't are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class StreamOptions(_Body):
    """What a stream has besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken, and does nothing."""


class GenerationBody(_Body):
    """What both kinds of requests have."""

    model: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: int | None = None
    stop: Stops | str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Only what means "as usual" is taken:
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Taken, and of no meaning here:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true.")
        return self

    @property
    def stops(self) -> list[str]:
        """Return the texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MOST_ANSWERS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Literal[1, None] = None
    echo: Literal[False, None] = None
    suffix: None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Return of how many tokens; None: no log-probabilities."""
        return self.logprobs


class ContentPart(_Body):
    """A part of a message; text alone is known."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """Return what it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class _TextFormat(_Body):
    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: _TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto", None] = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true.")
        return self

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Return of how many tokens; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
