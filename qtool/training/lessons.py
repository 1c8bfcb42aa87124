"""What a training recipe learns from: lessons, one a step, for decoders and for classifiers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.data.exercises import NOT_LEARNED, Learned
from qtool.training.adapting import Curriculum, ExerciseBatch


@dataclass(frozen=True, slots=True)
class LessonBatch:
    """What is learned from at once."""

    inputs: Mapping[str, Tensor]
    """What a model is called with by name, each (samples, ...): `input_ids` is always there."""
    labels: Tensor
    """Of a decoder (samples, length) int64: the token that follows each, or `NOT_LEARNED`. Of a
    classifier (samples,): its class, int64."""
    seen: Tensor
    """(samples, length) bool: what isn't there only to fill up."""

    def to(self, device: torch.device) -> "LessonBatch":
        """Return it on a device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return LessonBatch(inputs, self.labels.to(device), self.seen.to(device))

    def part(self, samples: slice) -> "LessonBatch":
        """Return some samples."""
        inputs = {name: value[samples] for name, value in self.inputs.items()}
        return LessonBatch(inputs, self.labels[samples], self.seen[samples])

    def take(self, other: "LessonBatch") -> None:
        """Become another one of the same shape, in place."""
        for name, value in self.inputs.items():
            value.copy_(other.inputs[name])
        self.labels.copy_(other.labels)
        self.seen.copy_(other.seen)

    @property
    def num_samples(self) -> int:
        """Return how many there are."""
        return len(self.labels)

    @property
    def classifies(self) -> bool:
        """Return whether a sample has one label, not one for each token."""
        return self.labels.dim() == 1

    def asked(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of what is asked for, (asked, classes or words), and its labels.

        Args:
            logits: (samples, classes) or (samples, length, words).
        """
        if self.classifies:
            return logits, self.labels
        wanted = self.labels != NOT_LEARNED
        return logits[wanted], self.labels[wanted]


@dataclass(frozen=True, slots=True)
class Lessons:
    """All that is learned from, in an order that is the same wherever a run begins."""

    of_step: Callable[[int], LessonBatch]
    held_out: Sequence[LessonBatch]
    """What is looked at; nothing is learned from it."""
    steps_per_epoch: int
    """So many steps see everything once."""
    one_shape: bool = False
    """All of `of_step` have one, so that a step can be one CUDA graph."""

    def on(self, device: torch.device) -> "Lessons":
        """Return the same on a device."""
        held_out = [lesson.to(device) for lesson in self.held_out]
        return replace(self, of_step=lambda step: self.of_step(step).to(device), held_out=held_out)


def causal_lessons(curriculum: Curriculum) -> Lessons:
    """Return exercises of a decoder as lessons."""
    return Lessons(
        lambda step: _causal(curriculum.of_step(step)),
        [_causal(batch) for batch in curriculum.held_out_batches()],
        curriculum.steps_per_epoch,
        one_shape=True,
    )


def _causal(batch: ExerciseBatch) -> LessonBatch:
    """Return what each token is followed by; decoders see nothing of what fills a row up."""
    nothing = torch.full_like(batch.labels[:, :1], NOT_LEARNED)
    labels = torch.cat([batch.labels[:, 1:], nothing], 1)
    return LessonBatch({"input_ids": batch.tokens}, labels, batch.labels != NOT_LEARNED)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with a class each: batches are as long as their longest text."""

    learned: Sequence[Learned]
    """Tokens, and one label."""
    second: Sequence[int]
    """From which token on each is the second of two texts: types of tokens are 1."""
    batch: int
    seed: int = 0
    filler: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Return how many steps see each text once; the last begins again to be full."""
        return -(-len(self.learned) // self.batch)

    def of_step(self, step: int) -> LessonBatch:
        """Return what is learned in a step: all texts in a new order each time."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.learned), generator=generator).tolist()
        return self.lesson(
            [order[(place * self.batch + n) % len(order)] for n in range(self.batch)]
        )

    def in_order(self) -> list[LessonBatch]:
        """Return all texts, those of about one length together."""
        order = sorted(range(len(self.learned)), key=lambda n: len(self.learned[n].tokens))
        starts = range(0, len(order), self.batch)
        return [self.lesson(order[start : start + self.batch]) for start in starts]

    def lesson(self, numbers: Sequence[int]) -> LessonBatch:
        """Return some texts."""
        pieces = [self.learned[number] for number in numbers]
        length = max(len(piece.tokens) for piece in pieces)
        tokens = torch.full((len(pieces), length), self.filler)
        seen, types = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for row, (number, piece) in enumerate(zip(numbers, pieces, strict=True)):
            count = len(piece.tokens)
            tokens[row, :count], seen[row, :count] = piece.tokens, 1
            types[row, self.second[number] : count] = 1
        inputs = {"input_ids": tokens, "attention_mask": seen, "token_type_ids": types}
        return LessonBatch(inputs, torch.cat([piece.labels for piece in pieces]), seen.bool())
