"""Adapting: what was installed in a model learns to predict the labels of exercises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.core.parts import Parts, slices, within_memory
from qtool.data.exercises import NOT_LEARNED, Learned, owners, padded
from qtool.training.descent import Learning, Memory, descend
from qtool.training.schedule import Point, Schedule

LOOKS_AT_EXERCISES = "looks at held-out exercises are taken"
"""Where memory is full in parts: a sentence begins so."""
ROUND_TO = 8
"""Lengths of batches are multiples of it, as tensor cores like them."""


@dataclass(frozen=True, slots=True)
class ExerciseBatch:
    """What is learned at once."""

    tokens: Tensor  # (samples, length) int64
    labels: Tensor
    """The same; where they are `NOT_LEARNED`, nothing is asked."""
    owners: Tensor | None = None
    """The same: which exercise of its row a token belongs to; None: there is one in each."""

    def to(self, device: torch.device) -> "ExerciseBatch":
        """Return it on a device."""
        owners = None if self.owners is None else self.owners.to(device)
        return ExerciseBatch(self.tokens.to(device), self.labels.to(device), owners)

    def part(self, samples: slice) -> "ExerciseBatch":
        """Return some samples."""
        owners = None if self.owners is None else self.owners[samples]
        return ExerciseBatch(self.tokens[samples], self.labels[samples], owners)

    def take(self, other: "ExerciseBatch") -> None:
        """Become another one, in place."""
        self.tokens.copy_(other.tokens)
        self.labels.copy_(other.labels)
        if self.owners is not None and other.owners is not None:
            self.owners.copy_(other.owners)

    def num_learned(self) -> Tensor:
        """Return how many tokens are asked for."""
        return (self.labels[:, 1:] != NOT_LEARNED).sum()

    def apart(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what lets exercises of a row not see each other: a mask, and positions."""
        if self.owners is None:
            return {}
        length = self.owners.shape[1]
        place = torch.arange(length, device=self.owners.device)
        same = self.owners[:, None, :] == self.owners[:, :, None]
        seen = same & (place <= place[:, None])
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill(~seen, torch.finfo(dtype).min)
        begins = torch.where(same, place, length).amin(-1)
        return {"attention_mask": mask[:, None], "position_ids": place - begins}


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
    is_packed: bool = False
    """Rows may have several exercises, which don't see each other."""

    @property
    def steps_per_epoch(self) -> int:
        """Return how many steps see each exercise once; the last one begins again to be full."""
        return -(-len(self.exercises) // self.batch)

    @cached_property
    def length(self) -> int:
        """Return the length of all batches: one shape, so that a step can be one CUDA graph."""
        longest = max(len(one.tokens) for one in (*self.exercises, *self.held_out))
        return -(-longest // ROUND_TO) * ROUND_TO

    def of_step(self, step: int) -> ExerciseBatch:
        """Return what is learned in a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.exercises), generator=generator).tolist()
        chosen = [order[(place * self.batch + n) % len(order)] for n in range(self.batch)]
        return self._batch([self.exercises[index] for index in chosen])

    def _batch(self, pieces: Sequence[Learned]) -> ExerciseBatch:
        tokens, labels = padded(pieces, self.length, self.filler)
        return ExerciseBatch(
            tokens, labels, owners(pieces, self.length) if self.is_packed else None
        )

    def some(self, count: int, device: torch.device) -> list[ExerciseBatch]:
        """Return a few rows one by one, not filled up."""
        every = max(1, len(self.exercises) // count)
        chosen = self.exercises[::every][:count]
        found = (
            ExerciseBatch(
                one.tokens[None],
                one.labels[None],
                owners([one], len(one.tokens)) if self.is_packed else None,
            )
            for one in chosen
        )
        return [one.to(device) for one in found]

    def held_out_batches(self) -> list[ExerciseBatch]:
        """Return what is looked at, in batches of the same shape but for the last."""
        groups = (
            self.held_out[first : first + self.batch]
            for first in range(0, len(self.held_out), self.batch)
        )
        return [self._batch(group) for group in groups]


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

    def predicted(self, batch: ExerciseBatch) -> Tensor:
        """Return logits, (samples, length, vocab_size)."""
        on, kind = self.autocast is not None, batch.tokens.device.type
        with torch.autocast(kind, self.autocast, enabled=on, cache_enabled=False):
            apart = batch.apart(self.model.dtype)
            logits: Tensor = self.model(batch.tokens, use_cache=False, **apart).logits
        return logits

    def surprise(self, batch: ExerciseBatch, smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy of the labels, summed, in nats.

        Args:
            batch: Tokens and labels.
            smoothing: Share of the label that goes to all tokens alike.
        """
        return nn.functional.cross_entropy(
            self.predicted(batch)[:, :-1].flatten(0, 1).float(),
            batch.labels[:, 1:].flatten(),
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
    now = curriculum.of_step(0).to(device)
    looks = [batch.to(device) for batch in curriculum.held_out_batches()]
    total = sum(int(batch.num_learned()) for batch in looks)

    def share(samples: slice) -> Tensor:
        return pupil.surprise(now.part(samples), pupil.smoothing) / now.num_learned()

    @torch.no_grad()
    def held_out() -> float:
        return float(torch.stack([_looked(pupil, batch, parts) for batch in looks]).sum()) / total

    return Learning(
        layers=(),
        vectors=(),
        feed=lambda step: now.take(curriculum.of_step(step)),
        loss=lambda: share(slice(None)),
        held_out=held_out,
        captured=pupil.captured,
        share=share,
        samples=lambda: len(now.tokens),
        parts=parts,
        parameters=pupil.parameters,
    )


def _looked(pupil: Pupil, batch: ExerciseBatch, parts: Parts | None) -> Tensor:
    """Return the summed surprise of a batch that isn't learned from."""

    def work(count: int) -> Tensor:
        some = slices(len(batch.tokens), count)
        return torch.stack([pupil.surprise(batch.part(one)) for one in some]).sum()

    return within_memory(parts, LOOKS_AT_EXERCISES, work, most=len(batch.tokens))
