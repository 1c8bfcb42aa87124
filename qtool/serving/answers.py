"""What is answered: the JSON of both kinds of requests, whole and in chunks."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from qtool.base import Tokenizer
from qtool.serving.text import UNDECODED, TextPiece
from qtool.serving.token_bytes import bytes_of
from qtool.serving.tokens import Finish, TokenEvent

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON hasn't."""
ShownTokens = Sequence[tuple[TokenEvent, int]]
Choices = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        """Return it as it is sent."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Answer(Protocol):
    """How a kind of request is answered."""

    id: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice of a first chunk without text; None: there is none."""
        ...

    def chunk(self, index: int, piece: TextPiece) -> dict[str, Any]:
        """Return the choice of a chunk."""
        ...

    def choice(self, index: int, text: str, tokens: ShownTokens, finish: Finish) -> dict[str, Any]:
        """Return a whole choice."""
        ...

    def whole(self, choices: Choices, usage: TokenUsage) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        ...

    def event(
        self, choices: Sequence[Mapping[str, Any]], usage: TokenUsage | None
    ) -> dict[str, Any]:
        """Return what one event of a stream carries."""
        ...


@dataclass
class _Answer:
    """What both have."""

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    model: str
    tokenizer: Tokenizer
    with_logprobs: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def whole(self, choices: Choices, usage: TokenUsage) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        return {**self._head(self.whole_kind), "choices": list(choices), "usage": usage.body()}

    def event(
        self, choices: Sequence[Mapping[str, Any]], usage: TokenUsage | None
    ) -> dict[str, Any]:
        """Return what one event of a stream carries."""
        head = {**self._head(self.chunk_kind), "choices": list(choices)}
        return head if usage is None else {**head, "usage": usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class CompletionAnswer(_Answer):
    """Of /v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return None."""
        del index
        return None

    def chunk(self, index: int, piece: TextPiece) -> dict[str, Any]:
        """Return the choice of a chunk."""
        logprobs = self._logprobs(piece.tokens) if self.with_logprobs else None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
        }

    def choice(self, index: int, text: str, tokens: ShownTokens, finish: Finish) -> dict[str, Any]:
        """Return a whole choice, which is a single chunk."""
        return self.chunk(index, TextPiece(text, tuple(tokens), finish))

    def _logprobs(self, tokens: ShownTokens) -> dict[str, Any]:
        known = [(event, start, event.logprobs) for event, start in tokens if event.logprobs]
        return {
            "tokens": [self._token_text(event.token) for event, _, _ in known],
            "token_logprobs": [_finite(each.logprob) for _, _, each in known],
            "top_logprobs": [
                {self._token_text(token): _finite(value) for token, value in reversed(each.top)}
                for _, _, each in known
            ],
            "text_offset": [start for _, start, _ in known],
        }


class ChatAnswer(_Answer):
    """Of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the role of what comes."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: TextPiece) -> dict[str, Any]:
        """Return the choice of a chunk."""
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text or piece.tokens else {},
            "logprobs": self._logprobs(piece.tokens) if self.with_logprobs else None,
            "finish_reason": piece.finish,
        }

    def choice(self, index: int, text: str, tokens: ShownTokens, finish: Finish) -> dict[str, Any]:
        """Return a whole choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens) if self.with_logprobs else None,
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: ShownTokens) -> dict[str, Any]:
        known = [(event, event.logprobs) for event, _ in tokens if event.logprobs]
        content = [
            {
                **self._described(event.token, each.logprob),
                "top_logprobs": [self._described(*pair) for pair in each.top],
            }
            for event, each in known
        ]
        return {"content": content, "refusal": None}

    def _described(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        raw = bytes_of(self.tokenizer, token) if UNDECODED in text else text.encode()
        known = None if raw is None else list(raw)
        return {"token": text, "logprob": _finite(logprob), "bytes": known}


def completion_answer(model: str, tokenizer: Tokenizer, *, with_logprobs: bool) -> Answer:
    """Return how a completion is answered."""
    return CompletionAnswer(model, tokenizer, with_logprobs)


def chat_answer(model: str, tokenizer: Tokenizer, *, with_logprobs: bool) -> Answer:
    """Return how a chat is answered."""
    return ChatAnswer(model, tokenizer, with_logprobs)


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)
