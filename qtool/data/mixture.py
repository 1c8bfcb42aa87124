"""A mixture of sources: samples in given shares, each of one source and from a document's start."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.base import Tokenizer
from qtool.data.calibration import CalibrationSet, held_out_count, tokenizer_digest
from qtool.data.corpora import Corpus
from qtool.data.documents import Collection, Document
from qtool.data.rendering import Rendered, Rendering, as_text, rendered
from qtool.data.special_tokens import document_ends
from qtool.errors import DataError

ARTICLE = re.compile(r"^(?= = [^=\n]+ = $)", re.MULTILINE)
"""Where the running text of WikiText has another article."""
PARAGRAPH = re.compile(r"\n\s*\n")
LEAST_PART_CHARACTERS = 2000
PART_CHARACTERS = 3
"""Of a part, per token of the longest sample: little of it is cut off, and the next one begins."""
CHARACTERS_READ = 32
"""Of a source, per token that is drawn from it: then nobody reads on."""
LEAST_CHARACTERS = 1 << 22


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a mixture."""

    texts: Corpus | Collection
    share: float
    """Of the samples."""
    rendering: Rendering | None = None
    """None: chats in the model's template if it has one, else as text."""


def draw_mixture(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    seed: int,
    holdout: float,
) -> CalibrationSet:
    """Draw samples of the given lengths, in an order whose beginnings have the shares as well.

    Each sample is filled with documents of one source in random order, the last one cut. A source
    that is used up begins again in a new order. The last samples of a source, as many as
    `CalibrationSet.split` holds out, are of parts that no other sample has.

    Args:
        sources: What to draw from; each is read once.
        tokenizer: Of the model.
        lengths: In tokens, one for each sample; these are (length,) int64.
        seed: Of all that is random.
        holdout: Fraction of the samples of a source that will be held out.

    Raises:
        DataError: a source is empty or can't be read, or a document can't be rendered as it asks.
    """
    order = interleave([source.share for source in sources], len(lengths))
    drawn: dict[int, Tensor] = {}
    about = []
    for index, source in enumerate(sources):
        places = [place for place, owner in enumerate(order) if owner == index]
        parts = _parts(source, sum(lengths[place] for place in places), max(lengths, default=0))
        generator = random.Random(f"{seed} {index}")
        generator.shuffle(parts)
        reserved = min(max(1, round(holdout * len(parts))), len(parts) // 2)
        piles = [
            _Pile(some, tokenizer, source.rendering, generator)
            for some in (parts[reserved:], parts[:reserved] or parts)
        ]
        solved = len(places) - held_out_count(len(places), holdout)
        for number, place in enumerate(places):
            drawn[place] = piles[number >= solved].sample(lengths[place])
        about.append(_about(source, piles, [drawn[place] for place in places]))
    samples = tuple(drawn[place] for place in range(len(lengths)))
    provenance = {
        "dataset": f"a mixture of {', '.join(source.texts.name for source in sources)}",
        "sources": about,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": any(one["chats"] for one in about),
        "documents": sum(one["documents"] for one in about),
        "starts at documents": True,
        "samples": len(samples),
        "samples wanted": len(samples),
        "tokens": sum(lengths),
        "tokens wanted": sum(lengths),
    }
    return CalibrationSet(samples, provenance, tuple(order))


def interleave(shares: Sequence[float], count: int) -> list[int]:
    """Return which share each of `count` places belongs to; any beginning is off by less than one.

    Tijdeman 1980, "The chairman assignment problem": among those that have less than their due, the
    one that would soonest have too little.
    """
    total, slack = sum(shares), 1 / max(1, 2 * len(shares) - 2)
    order: list[int] = []
    given = [0] * len(shares)
    for place in range(1, count + 1):
        due = [place * share / total - had for share, had in zip(shares, given, strict=True)]
        able = [index for index, one in enumerate(due) if one >= slack - 1e-9]
        chosen = min(able, key=lambda index: (1 - slack - due[index]) / shares[index])
        given[chosen] += 1
        order.append(chosen)
    return order


def in_parts(text: str, size: int) -> Iterator[str]:
    """Yield a text cut at empty lines, in parts of at most `size` characters where it has them.

    A sample starts at the start of a document: without this nobody would see the rest of a long
    one. White space alone is no part.
    """
    start = last = 0
    for end in [*(mark.end() for mark in PARAGRAPH.finditer(text)), len(text)]:
        if end - start > size and text[start:last].strip():
            yield text[start:last].strip()
            start = last
        last = end
    if rest := text[start:].strip():
        yield rest


def _parts(source: Source, num_tokens: int, longest: int) -> list[Document]:
    """Return the documents of a source, long texts in parts; of a large source the first ones."""
    texts, size = source.texts, max(PART_CHARACTERS * longest, LEAST_PART_CHARACTERS)
    parts: list[Document] = []
    left = max(CHARACTERS_READ * num_tokens, LEAST_CHARACTERS)
    for document in _documents(texts):
        content, place = document.content, document.place
        if isinstance(content, str):
            parts += [Document(part, place) for part in in_parts(content, size)]
            left -= len(content)
        else:
            parts.append(document)
            left -= len(as_text(content))
        if left < 0:
            break
    if not parts:
        raise DataError(f"{texts.name} holds no text: its documents are all empty.")
    return parts


def _documents(texts: Corpus | Collection) -> Iterator[Document]:
    if isinstance(texts, Collection):
        return texts.documents
    articles = ARTICLE.split(texts.text)
    return (Document(one, f"{texts.name} article {n}") for n, one in enumerate(articles))


class _Pile:
    """Documents in random order, again and again."""

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        rendering: Rendering | None,
        generator: random.Random,
    ) -> None:
        self.documents, self.rendering, self.generator = documents, rendering, generator
        self.tokenizer, self.rounds, self.samples = tokenizer, 0, 0
        self.read: Counter[str] = Counter()
        self._ends = document_ends(tokenizer)
        self._turns = itertools.cycle(self._ends)
        self._pieces = self._all()

    def sample(self, length: int) -> Tensor:
        """Return the next sample, (length,) int64.

        Every second one of texts starts with what ended the text before it, as in a packed stream.
        """
        first = next(self._pieces)
        pieces = [self._ended(first)]
        self.samples += 1
        if self.samples % 2 == 0 and not first.is_chat and self._ends:
            pieces.insert(0, torch.tensor([next(self._turns)]))
        while sum(map(len, pieces)) < length:
            pieces.append(self._ended(next(self._pieces)))
        return torch.cat(pieces)[:length]

    def _all(self) -> Iterator[Rendered]:
        """Yield the documents that have tokens, without end."""
        kept: dict[int, Rendered] = {}
        order = list(range(len(self.documents)))
        while not kept or any(len(one.tokens) for one in kept.values()):
            self.rounds += 1
            for index in order:
                if index not in kept:
                    document = self.documents[index]
                    kept[index] = rendered(self.tokenizer, document, self.rendering)
                    self.read.update(documents=1, chats=int(kept[index].is_chat))
                if len(kept[index].tokens):
                    yield kept[index]
            self.generator.shuffle(order)
        place = self.documents[0].place
        raise DataError(f"The tokenizer makes no tokens of {place} and all that follows it.")

    def _ended(self, piece: Rendered) -> Tensor:
        """Return the tokens of a document and what stands between it and the next."""
        tokens, bos = piece.tokens, self.tokenizer.bos_token_id
        if piece.is_chat or tokens[-1] in self._ends:
            return tokens
        if self._ends:
            return torch.cat([tokens, torch.tensor([next(self._turns)])])
        return tokens if bos in (None, tokens[0]) else torch.cat([torch.tensor([bos]), tokens])


def _about(source: Source, piles: Sequence[_Pile], samples: Sequence[Tensor]) -> Mapping[str, Any]:
    return {
        "dataset": source.texts.name,
        **source.texts.origin,
        "share": source.share,
        "as": source.rendering,
        "documents": sum(pile.read["documents"] for pile in piles),
        "chats": sum(pile.read["chats"] for pile in piles),
        "rounds": max(pile.rounds for pile in piles),
        "samples": len(samples),
        "tokens": sum(len(sample) for sample in samples),
    }
