"""Adapting: what was installed in a model learns to predict the labels of exercises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.core.parts import Parts, slices, within_memory
from qtool.data.exercises import NOT_LEARNED, Learned, padded
from qtool.training.descent import Learning, Memory, descend
from qtool.training.schedule import Point, Schedule

LOOKS_AT_EXERCISES = "looks at held-out exercises are taken"
"""Where memory is full in parts: a sentence begins so."""
ROUND_TO = 8
"""Lengths of batches are multiples of it, as tensor cores like them."""


@dataclass(frozen=True)
class Curriculum:
    """What is learned from, and in which order: the same for the same seed, wherever it begins."""

    exercises: Sequence[Learned]
    held_out: Sequence[Learned]
    batch: int
    """Exercises of a step."""
    seed: int = 0
    filler: int = 0
    """Any token: stands where an exercise is shorter than the batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Return how many steps see each exercise once; the last one begins again to be full."""
        return -(-len(self.exercises) // self.batch)

    @cached_property
    def length(self) -> int:
        """Return the length of all batches: one shape, so that a step can be one CUDA graph."""
        longest = max(len(one.tokens) for one in (*self.exercises, *self.held_out))
        return -(-longest // ROUND_TO) * ROUND_TO

    def of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Return tokens and labels of a step, each (batch, length) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.exercises), generator=generator).tolist()
        chosen = [order[(place * self.batch + n) % len(order)] for n in range(self.batch)]
        return padded([self.exercises[index] for index in chosen], self.length, self.filler)

    def some(self, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return a few exercises one by one, not padded: tokens and labels, (1, length) each."""
        every = max(1, len(self.exercises) // count)
        chosen = self.exercises[::every][:count]
        return [(one.tokens[None].to(device), one.labels[None].to(device)) for one in chosen]

    def held_out_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is looked at, in batches of the same shape but for the last."""
        groups = (
            self.held_out[first : first + self.batch]
            for first in range(0, len(self.held_out), self.batch)
        )
        return [padded(group, self.length, self.filler) for group in groups]


@dataclass(frozen=True, slots=True)
class Pupil:
    """A model, what of it learns, and how it runs."""

    model: CausalModel
    parameters: Sequence[nn.Parameter]
    autocast: torch.dtype | None = None
    """In which it runs; None: as it is."""
    captured: bool = False
    """On a card a step is one CUDA graph."""
    smoothing: float = 0.0
    """Of labels (Szegedy et al. 2015, arXiv 1512.00567), while it learns."""

    def surprise(self, tokens: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy of the labels, summed, in nats.

        Args:
            tokens: (samples, length) int64.
            labels: The same; where they are `NOT_LEARNED`, nothing is asked.
            smoothing: Share of the label that goes to all tokens alike.
        """
        on, kind = self.autocast is not None, tokens.device.type
        with torch.autocast(kind, self.autocast, enabled=on, cache_enabled=False):
            logits: Tensor = self.model(tokens, use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=NOT_LEARNED,
            reduction="sum",
            label_smoothing=smoothing,
        )


def adapt_to(
    pupil: Pupil,
    curriculum: Curriculum,
    schedule: Schedule,
    report: Callable[[Point], None],
    memory: Memory | None = None,
    parts: Parts | None = None,
) -> list[Point]:
    """Let what was installed learn; it ends where the held-out loss was least.

    Args:
        pupil: The model.
        curriculum: What it learns from.
        schedule: How long and how fast.
        report: Is told of each point; losses are nats per learned token.
        memory: Lets it go on where it was stopped, to the same result.
        parts: That batches are learned from in where memory is full; None: they are whole.
    """
    return descend(learning_of(pupil, curriculum, parts), schedule, report, memory)


def learning_of(pupil: Pupil, curriculum: Curriculum, parts: Parts | None = None) -> Learning:
    """Return what is learned, and by what loss."""
    device = pupil.parameters[0].device
    tokens, labels = (each.to(device) for each in curriculum.of_step(0))
    looks = [(a.to(device), b.to(device)) for a, b in curriculum.held_out_batches()]
    total = sum(int((wanted[:, 1:] != NOT_LEARNED).sum()) for _, wanted in looks)

    def feed(step: int) -> None:
        for old, new in zip((tokens, labels), curriculum.of_step(step), strict=True):
            old.copy_(new)

    def share(samples: slice) -> Tensor:
        count = (labels[:, 1:] != NOT_LEARNED).sum()
        return pupil.surprise(tokens[samples], labels[samples], pupil.smoothing) / count

    @torch.no_grad()
    def held_out() -> float:
        return float(torch.stack([_looked(pupil, *pair, parts) for pair in looks]).sum()) / total

    return Learning(
        layers=(),
        vectors=(),
        feed=feed,
        loss=lambda: share(slice(None)),
        held_out=held_out,
        captured=pupil.captured,
        share=share,
        samples=lambda: len(tokens),
        parts=parts,
        parameters=pupil.parameters,
    )


def _looked(pupil: Pupil, tokens: Tensor, labels: Tensor, parts: Parts | None) -> Tensor:
    """Return the summed surprise of a batch that isn't learned from."""

    def work(count: int) -> Tensor:
        some = slices(len(tokens), count)
        return torch.stack([pupil.surprise(tokens[one], labels[one]) for one in some]).sum()

    return within_memory(parts, LOOKS_AT_EXERCISES, work, most=len(tokens))
