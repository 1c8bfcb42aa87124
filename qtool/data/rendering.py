"""From a document of a mixture to tokens: a text as it is, a chat in the model's template."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from qtool.base import Tokenizer
from qtool.data.corpora import tokenize
from qtool.data.documents import Document, Messages
from qtool.data.samples import document_tokens
from qtool.errors import DataError

Rendering = Literal["text", "chat"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """The tokens of a document, and who ends it."""

    tokens: Tensor
    """(tokens,) int64, without a token that ends it but what the tokenizer or template writes."""
    is_chat: bool
    """The model's template wrote it, with all tokens between turns and chats."""


def rendered(tokenizer: Tokenizer, document: Document, rendering: Rendering | None) -> Rendered:
    """Return the tokens of a document.

    Args:
        tokenizer: Of the model.
        document: A text or a chat.
        rendering: `chat`: in the model's template or not at all. `text`: chats as plain text. None:
            in the template if the model has one that takes the chat.

    Raises:
        DataError: a chat is wanted, and it is none or the model has no template for it.
    """
    content = document.content
    if isinstance(content, str):
        if rendering == "chat":
            raise DataError(
                f"{document.place} is a text, and its source is to give chats (as: chat). Leave "
                "out 'as', or give lines with 'messages'."
            )
        return Rendered(tokenize(tokenizer, content), is_chat=False)
    if rendering == "chat":
        return _chat(tokenizer, document, content)
    if rendering is None and tokenizer.chat_template:
        with contextlib.suppress(DataError):
            return _chat(tokenizer, document, content)
    return Rendered(tokenize(tokenizer, as_text(content)), is_chat=False)


def as_text(messages: Messages) -> str:
    """Return a chat as paragraphs, each turn after the role that has it."""
    return "\n\n".join(
        f"{turn['role'].capitalize()}: {turn.get('content') or ''}" for turn in messages
    )


def _chat(tokenizer: Tokenizer, document: Document, messages: Sequence) -> Rendered:  # type: ignore[type-arg]
    """Return a chat in the template; where that knows no system turn, the user says it."""
    try:
        return Rendered(document_tokens(tokenizer, document), is_chat=True)
    except DataError:
        if len(messages) < 2 or messages[0]["role"] != "system":  # noqa: PLR2004
            raise
        system, user, *others = messages
        merged = {**user, "content": f"{system['content']}\n\n{user.get('content') or ''}"}
        return Rendered(
            document_tokens(tokenizer, replace(document, content=[merged, *others])), is_chat=True
        )
