"""A dense model learns labels: what other recipes take as their original. Nothing is quantized."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.core.parts import slices, within_memory
from qtool.training.descent import Learning
from qtool.training.following import LOOKS_AT_LESSONS
from qtool.training.lessons import LessonBatch
from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions:
    """How it learns."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01


@dataclass(slots=True)
class _Labels:
    """A model, and the labels that it learns."""

    trainee: Trainee
    now: LessonBatch

    def feed(self, step: int) -> None:
        self.now = self.trainee.lessons.of_step(step)

    def surprise(self, lesson: LessonBatch) -> Tensor:
        """Return the cross entropy of labels, summed, in nats."""
        kind, dtype = lesson.labels.device.type, self.trainee.autocast
        with torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False):
            found, labels = lesson.asked(self.trainee.original(**lesson.inputs).logits)
        return nn.functional.cross_entropy(found.float(), labels, reduction="sum")

    def share(self, samples: slice) -> Tensor:
        return self.surprise(self.now.part(samples)) / len(self.now.asked(self.now.labels)[0])

    @torch.no_grad()
    def held_out(self) -> float:
        lessons = self.trainee.lessons.held_out
        total = sum(len(lesson.asked(lesson.labels)[0]) for lesson in lessons)
        return float(torch.stack([self._looked(lesson) for lesson in lessons]).sum()) / total

    def _looked(self, lesson: LessonBatch) -> Tensor:
        def work(count: int) -> Tensor:
            some = slices(lesson.num_samples, count)
            return torch.stack([self.surprise(lesson.part(one)) for one in some]).sum()

        parts = self.trainee.parts
        return within_memory(parts, LOOKS_AT_LESSONS, work, most=lesson.num_samples)


def _prepare(trainee: Trainee, options: FinetuneOptions) -> PreparedTraining:
    model = trainee.original
    model.requires_grad_(requires_grad=True)
    labels = _Labels(trainee, trainee.lessons.of_step(0))
    schedule = Schedule(
        steps=trainee.steps,
        learning_rate=trainee.learning_rate,
        warmup=trainee.warmup,
        floor=0.0,
        falls="line",
        weight_decay=options.weight_decay,
        check_every=max(1, trainee.steps // trainee.checks),
    )
    learning = Learning(
        layers=(),
        vectors=(),
        feed=labels.feed,
        loss=lambda: labels.share(slice(None)),
        held_out=labels.held_out,
        share=labels.share,
        samples=lambda: labels.now.num_samples,
        parts=trainee.parts,
        parameters=list(model.parameters()),
    )
    return PreparedTraining(
        student=model,
        stages=[TrainingStage(name="train", learning=learning, schedule=schedule)],
        results=lambda: {name: value.detach() for name, value in model.named_parameters()},
    )


TRAINING = Training(
    summary="A dense model learns labels; nothing is quantized. Makes originals of classifiers.",
    options=FinetuneOptions,
    prepare=_prepare,
    learning_rate=5e-5,
    is_dense=True,
)
