"""A dense model learns labels: what other recipes take as their original. Nothing is quantized."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.core.parts import slices, within_memory
from qtool.training.descent import Learning
from qtool.training.following import LOOKS_AT_LESSONS
from qtool.training.lessons import Lesson
from qtool.training.recipes import Prepared, Stage, Trainee, Training
from qtool.training.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions:
    """How it learns."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01


def _prepare(trainee: Trainee, options: FinetuneOptions) -> Prepared:
    model, lessons = trainee.original, trainee.lessons
    model.requires_grad_(requires_grad=True)
    now = [lessons.of_step(0)]

    def feed(step: int) -> None:
        now[0] = lessons.of_step(step)

    def surprise(lesson: Lesson) -> Tensor:
        """Return the cross entropy of labels, summed, in nats."""
        kind, dtype = lesson.labels.device.type, trainee.autocast
        with torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False):
            found, labels = lesson.asked(model(**lesson.inputs).logits)
        return nn.functional.cross_entropy(found.float(), labels, reduction="sum")

    def share(samples: slice) -> Tensor:
        return surprise(now[0].part(samples)) / len(now[0].asked(now[0].labels)[0])

    @torch.no_grad()
    def held_out() -> float:
        total = sum(len(lesson.asked(lesson.labels)[0]) for lesson in lessons.held_out)

        def looked(lesson: Lesson) -> Tensor:
            def work(count: int) -> Tensor:
                some = slices(lesson.num_samples, count)
                return torch.stack([surprise(lesson.part(one)) for one in some]).sum()

            return within_memory(trainee.parts, LOOKS_AT_LESSONS, work, most=lesson.num_samples)

        return float(torch.stack([looked(lesson) for lesson in lessons.held_out]).sum()) / total

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
        feed=feed,
        loss=lambda: share(slice(None)),
        held_out=held_out,
        share=share,
        samples=lambda: now[0].num_samples,
        parts=trainee.parts,
        parameters=list(model.parameters()),
    )
    return Prepared(
        student=model,
        stages=[Stage(name="train", learning=learning, schedule=schedule)],
        results=lambda: {name: value.detach() for name, value in model.named_parameters()},
    )


TRAINING = Training(
    summary="A dense model learns labels; nothing is quantized. Makes originals of classifiers.",
    options=FinetuneOptions,
    prepare=_prepare,
    learning_rate=5e-5,
    writes="dense",
)
