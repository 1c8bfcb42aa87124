"""A student follows its original: in predictions, hidden states, attention; lesson by lesson.

Sources: TernaryBERT (arXiv 2009.12812) and Teacher Intervention (arXiv 2302.11812) for the losses;
that errors are relative, by sample, so that one weight suits every model and layer, is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.core.parts import Parts, slices, within_memory
from qtool.data.exercises import NOT_LEARNED
from qtool.training.descent import Learning
from qtool.training.divergence import divergence
from qtool.training.lessons import LessonBatch, Lessons
from qtool.training.student import learned_layers
from qtool.training.taps import Signal, Tap, errors_of

LOOKS_AT_LESSONS = "looks at held-out lessons are taken"
"""Where memory is full in parts: a sentence begins so."""


@dataclass(frozen=True, slots=True)
class LessonCounts:
    """What a mean over lessons is divided by."""

    asked: Tensor
    """int64 scalar: predictions that are asked for."""
    samples: int

    @staticmethod
    def of(lessons: Sequence[LessonBatch]) -> "LessonCounts":
        """Count lessons."""
        asked = torch.stack([(lesson.labels != NOT_LEARNED).sum() for lesson in lessons])
        return LessonCounts(asked.sum(), sum(lesson.num_samples for lesson in lessons))


@dataclass(frozen=True, slots=True)
class Following:
    """Two models, and how far the one is from the other."""

    original: CausalModel
    student: CausalModel
    weights: dict[Signal, float] = field(default_factory=dict)
    """Of the errors inside blocks; empty: predictions alone."""
    logits: float = 1.0
    """LossWeight of KL(original || student)."""
    taps: Sequence[Tap] = ()
    """Of the student's blocks; empty: nothing inside them is looked at."""
    sources: Sequence[Tap] = ()
    """Of the original's."""
    autocast: torch.dtype | None = None
    captured: bool = False
    """On a card a step is one CUDA graph, where lessons have one shape."""
    extra: Callable[[], Tensor] | None = None
    """Any other term of the loss, once a step, whatever is learned from."""

    def distance(
        self, lesson: LessonBatch, share: slice | None = None, counts: LessonCounts | None = None
    ) -> Tensor:
        """Return the loss of a lesson; or what some of its samples make of it, which adds up.

        Args:
            lesson: The whole.
            share: Which samples; None: all.
            counts: Of all lessons that the loss is a mean over; None: of this one.
        """
        counts = counts or LessonCounts.of([lesson])
        part = lesson if share is None else lesson.part(share)
        with torch.no_grad():
            wanted = _logits(self.original, part, None)
        found = _logits(self.student, part, self.autocast)
        total = torch.zeros((), device=lesson.labels.device)
        if self.logits and self.captured:  # nothing whose size depends on values
            shares = (part.labels != NOT_LEARNED) / counts.asked
            error = divergence(found.flatten(0, -2), wanted.flatten(0, -2), shares.flatten())
            total = total + self.logits * error
        elif self.logits:
            (given, _), (target, _) = part.asked(found), part.asked(wanted)
            if len(given):
                weight = self.logits * len(given) / counts.asked
                total = total + weight * divergence(given, target)
        if self.weights:
            errors = errors_of(self.taps, self.sources, self.weights, part.seen)
            total = total + errors / counts.samples
        return total

    def learning(
        self,
        lessons: Lessons,
        vectors: Sequence[nn.Parameter],
        feed: Callable[[int], None],
        parts: Parts | None,
    ) -> Learning:
        """Return what is learned, and by what loss.

        Args:
            lessons: What is learned from, on the device.
            vectors: Norms and biases that learn as well.
            feed: Called with each step, before its lesson is given.
            parts: That batches are learned from in where memory is full.
        """
        now = [lessons.of_step(0)]

        def give(step: int) -> None:
            feed(step)
            if self.captured:
                now[0].take(lessons.of_step(step))
            else:
                now[0] = lessons.of_step(step)

        def share(samples: slice | None) -> Tensor:
            loss = self.distance(now[0], samples)
            first = samples is None or samples.start == 0
            return loss + self.extra() if self.extra is not None and first else loss

        return Learning(
            layers=[layer for _, layer in learned_layers(self.student)],
            vectors=vectors,
            feed=give,
            loss=lambda: share(None),
            held_out=lambda: self.held_out(lessons.held_out, parts),
            captured=self.captured,
            share=share,
            samples=lambda: now[0].num_samples,
            parts=parts,
        )

    @torch.no_grad()
    def held_out(self, lessons: Sequence[LessonBatch], parts: Parts | None = None) -> float:
        """Return the mean loss over lessons: of predictions by token, inside blocks by sample.

        So it doesn't depend on which samples stand together.
        """
        counts = LessonCounts.of(lessons)
        return float(torch.stack([self._looked(one, counts, parts) for one in lessons]).sum())

    def _looked(self, lesson: LessonBatch, counts: LessonCounts, parts: Parts | None) -> Tensor:
        def work(count: int) -> Tensor:
            some = slices(lesson.num_samples, count)
            return torch.stack([self.distance(lesson, one, counts) for one in some]).sum()

        return within_memory(parts, LOOKS_AT_LESSONS, work, most=lesson.num_samples)


def _logits(model: CausalModel, lesson: LessonBatch, autocast: torch.dtype | None) -> Tensor:
    more = {} if lesson.classifies else {"use_cache": False}
    kind = lesson.labels.device.type
    with torch.autocast(kind, autocast, enabled=autocast is not None, cache_enabled=False):
        logits: Tensor = model(**lesson.inputs, **more).logits
    return logits
