"""From texts to samples: streams of tokens, cut to the wanted lengths and never padded."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qtool.base import Tokenizer
from qtool.data.corpora import Corpus, tokenize
from qtool.data.documents import Collection, Document, Messages
from qtool.errors import DataError
from qtool.wording import reason


def streams(
    tokenizer: Tokenizer, texts: Corpus | Collection, read: Counter[str]
) -> Iterator[Tensor]:
    """Yield the tokens of each document, (tokens,) int64; a running text is a single one.

    `read` counts `documents`, `chats` and `tokens` while they are read.

    Raises:
        DataError: a document can't be read, or is a chat that the tokenizer can't render.
    """
    if isinstance(texts, Corpus):
        stream = tokenize(tokenizer, texts.text)
        read.update(documents=1, tokens=len(stream))
        yield stream
        return
    for document in texts.documents:
        stream = document_tokens(tokenizer, document)
        is_chat = not isinstance(document.content, str)
        read.update(documents=1, chats=int(is_chat), tokens=len(stream))
        yield stream


def document_tokens(tokenizer: Tokenizer, document: Document) -> Tensor:
    """Return the tokens of one document and what separates it from its neighbours, (tokens,) int64.

    A text ends with the tokenizer's eos; if there is none, it starts with bos; if there is neither,
    nothing separates it. A chat is what the model's template makes of it: that sets such tokens
    itself.

    Raises:
        DataError: it is a chat, and the tokenizer has no template for it.
    """
    text = document.content
    if not isinstance(text, str):
        return _chat_tokens(tokenizer, text, document.place)
    tokens = tokenize(tokenizer, text)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not text.strip() or not len(tokens):
        return tokens[:0]  # special tokens alone are no document
    if eos is not None and tokens[-1] != eos:
        return torch.cat([tokens, torch.tensor([eos])])
    if eos is None and bos is not None and tokens[0] != bos:
        return torch.cat([torch.tensor([bos]), tokens])
    return tokens


def _chat_tokens(tokenizer: Tokenizer, messages: Messages, place: str) -> Tensor:
    if not tokenizer.chat_template:
        raise DataError(
            f"{place} is a chat, but the model's tokenizer has no chat template. Give lines with "
            "'text', or use a model that was tuned for chats."
        )
    text = _rendered(tokenizer, messages, place)
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _rendered(tokenizer: Tokenizer, messages: Messages, place: str) -> str:
    """Return a chat as the model's template writes it.

    Templates differ on turns without content, such as calls of tools: some know them, some fail,
    some write the word None, which nobody said. The last two get empty content.
    """

    def render(turns: Messages) -> str:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False))

    filled = [{**turn, "content": turn.get("content") or ""} for turn in messages]
    try:
        text = render(filled)
        if filled != list(messages):
            with contextlib.suppress(Exception):  # a template is a program and raises what it likes
                as_given = render(messages)
                text = as_given if as_given.count("None") <= text.count("None") else text
    except Exception as error:  # as above
        raise DataError(
            f"{place}: the model's chat template refuses it: {reason(error)}."
        ) from error
    return text


def cut(pieces: Iterable[Tensor], lengths: Sequence[int], *, at_starts: bool) -> Iterator[Tensor]:
    """Yield consecutive samples of the given lengths, as long as there are tokens for a whole one.

    Args:
        pieces: Tokens of each document, (tokens,) int64; as few as possible are read.
        lengths: Of the samples.
        at_starts: Start each sample at the start of a piece. The pieces that follow fill it up, and
            what is left of the last is not used. False: the pieces are one stream.
    """
    remaining = iter(pieces)
    rest = torch.empty(0, dtype=torch.int64)
    for length in lengths:
        while len(rest) < length:
            piece = next(remaining, None)
            if piece is None:
                return
            rest = torch.cat([rest, piece])
        yield rest[:length]
        rest = rest[:0] if at_starts else rest[length:]
