"""CalibrationSet: token samples and where they came from."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.base import Tokenizer
from qtool.data.corpora import Corpus
from qtool.data.documents import Collection
from qtool.data.samples import cut, streams
from qtool.errors import DataError


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Samples of tokens, each (length,) int64, and their provenance."""

    samples: tuple[Tensor, ...]
    provenance: Mapping[str, Any]
    """Dataset or sources, tokenizer digest, seed, requested and used lengths: JSON-able."""
    sources: tuple[int, ...] = ()
    """Of a mixture: the place in the provenance's sources of what each sample is from."""

    @property
    def num_tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(len(sample) for sample in self.samples)

    def digest(self) -> str:
        """Return the sha256 of all tokens and their lengths, shortened."""
        state = hashlib.sha256()
        for sample in self.samples:
            state.update(len(sample).to_bytes(8, "little"))
            state.update(sample.numpy().astype("<i8").tobytes())
        return state.hexdigest()[:16]

    def split(self, holdout: float) -> tuple["CalibrationSet", "CalibrationSet"]:
        """Return the samples to solve with and the last ones of each source, held out for choices.

        Args:
            holdout: Fraction of the samples. At least one is held out, and one of each source that
                has two; at least one is left.
        """
        owners = self.sources or (0,) * len(self.samples)
        held_out: set[int] = set()
        for owner in set(owners):
            places = [place for place, one in enumerate(owners) if one == owner]
            held_out.update(places[len(places) - held_out_count(len(places), holdout) :])
        held_out = held_out or {len(owners) - 1}
        return (
            self._part([place for place in range(len(owners)) if place not in held_out]),
            self._part(sorted(held_out)),
        )

    def _part(self, places: Sequence[int]) -> "CalibrationSet":
        sources = tuple(self.sources[place] for place in places if self.sources)
        return CalibrationSet(
            tuple(self.samples[place] for place in places), self.provenance, sources
        )


def held_out_count(count: int, holdout: float) -> int:
    """Return how many of the samples of one source are held out."""
    return min(max(1, round(holdout * count)), max(count - 1, 0))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of the vocabulary, to tell whether two sets can be compared."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def draw_samples(
    tokenizer: Tokenizer,
    texts: Corpus | Collection,
    lengths: Sequence[int],
    *,
    at_starts: bool = False,
) -> CalibrationSet:
    """Cut consecutive samples of the given lengths from the start of a text or of documents.

    Documents are read as far as needed. With `at_starts` each sample starts at the start of one; a
    running text has no other start than its own, and is cut in one go all the same.

    Raises:
        DataError: the texts hold less than two samples, or a document can't be used.
    """
    read: Counter[str] = Counter()
    pieces = streams(tokenizer, texts, read)
    at_starts = at_starts and isinstance(texts, Collection)
    samples = tuple(cut(pieces, lengths, at_starts=at_starts))
    if not read["tokens"]:
        raise DataError(
            f"{texts.name} holds no text: each of its {read['documents']} documents is empty."
        )
    if len(samples) < 2:  # noqa: PLR2004
        raise DataError(
            f"{texts.name} has {read['tokens']} tokens; calibration takes at least two samples, "
            f"the first of them {lengths[0]} long. Use a longer text or a shorter sequence_length."
        )
    provenance = {
        "dataset": texts.name,
        **texts.origin,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": read["chats"] > 0,
        "documents": read["documents"],
        "starts at documents": at_starts,
        "samples": len(samples),
        "samples wanted": len(lengths),
        "tokens": sum(len(sample) for sample in samples),
        "tokens wanted": sum(lengths),
    }
    return CalibrationSet(samples, provenance)


def batches(samples: Sequence[Tensor], max_tokens: int) -> list[Tensor]:
    """Stack neighbours of equal length: (samples, length) int64, at most `max_tokens` each."""
    stacked: list[list[Tensor]] = []
    for sample in samples:
        last = stacked[-1] if stacked else None
        if last and len(last[0]) == len(sample) and (len(last) + 1) * len(sample) <= max_tokens:
            last.append(sample)
        else:
            stacked.append([sample])
    return [torch.stack(group) for group in stacked]


def some_samples(samples: Sequence[Tensor], num_tokens: int) -> Sequence[Tensor]:
    """Return evenly spaced samples with about that many tokens, at least one."""
    total = sum(map(len, samples))
    return samples[:: max(1, round(total / num_tokens))]
