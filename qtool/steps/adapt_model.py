"""Adapt a loaded checkpoint: install what learns, let it learn, and go on where it was stopped."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import Emit, Fallback, Progress
from qtool.core.experts import routes_tokens
from qtool.core.parts import Parts
from qtool.data.exercises import NOT_LEARNED, Learned, owners
from qtool.errors import DataError, RecipeError
from qtool.modeling.load import LoadedModel
from qtool.plugins import PluginOptions
from qtool.recipe.matching import matches
from qtool.runtime.modules import QuantizedLinear, QuantizedWeight
from qtool.steps.options import read_options
from qtool.steps.unfinished_adapter import UnfinishedAdapter
from qtool.training.adapters import Adaptable, AdapterKind, Installed
from qtool.training.adapting import Curriculum, ExerciseBatch, Pupil, adapt_to
from qtool.training.schedule import Point, Schedule
from qtool.training.student import recompute_blocks
from qtool.wording import shown

LOOKS_OF_A_RUN = 20
"""At the held-out exercises, over a whole run."""
SAME_LOGITS = 0.05
"""What rounding may change, in bfloat16, of their norm."""
ANALYSED = 64
"""Exercises that a kind of adapter may look at before it is installed."""
LARGE_MODEL = 10**9
"""Weights from which blocks are recomputed, and a step isn't captured as a graph, which takes its
memory once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptOptions:
    """How a model is adapted."""

    epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float | None = None
    """None: as the kind of adapter has it."""
    weight_decay: float = 0.0
    warmup_share: float = 0.05
    """Of the steps."""
    label_smoothing: float = 0.0
    max_length: int = 512
    """Tokens of an exercise; longer ones are cut."""
    patience: int | None = None
    """Looks at the held-out exercises without a gain after which it ends; None: it doesn't."""
    packing: bool = False
    """Put exercises behind one another in rows of `max_length` tokens, unseen by each other."""
    recompute: bool = False
    """Run each block once more on the way back in place of keeping what it computed: a third
    slower, the memory of one block. Large models do it anyway."""
    seed: int = 0
    targets: tuple[str, ...] = ("*",)
    """Globs of the linears that get adapters, by dotted name."""
    kind_options: Mapping[str, Any] = field(default_factory=dict)

    def checked(self, kind: AdapterKind) -> PluginOptions:
        """Return the options of the kind itself.

        Raises:
            RecipeError: unknown key, wrong type or impossible value.
        """
        return read_options("adapt", kind.options, self.kind_options, "--set")

    def schedule(self, kind: AdapterKind, steps_per_epoch: int) -> Schedule:
        """Return how long and how fast."""
        steps = max(1, math.ceil(self.epochs * steps_per_epoch))
        return Schedule(
            steps=steps,
            learning_rate=kind.learning_rate if self.learning_rate is None else self.learning_rate,
            warmup=math.ceil(self.warmup_share * steps),
            floor=0.0,
            falls="line",
            weight_decay=self.weight_decay,
            patience=self.patience,
            check_every=max(1, steps // LOOKS_OF_A_RUN),
        )


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter goes on."""

    loaded: LoadedModel
    """A checkpoint of qtool."""
    original: Callable[[str], Tensor] | None
    """(layer) -> its weight before it was quantized, (out_features, in_features) float32; None:
    nobody has it."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """What a run has come to."""

    points: Sequence[Point]
    installed: Installed
    tokens_per_second: float
    """Of those that are learned, over the steps of this run."""

    @property
    def best_loss(self) -> float:
        """Return the least loss on held-out exercises, which the adapter has."""
        return min(point.held_out for point in self.points)


def adapt_model(
    base: Base,
    kind: AdapterKind,
    options: AdaptOptions,
    curriculum: Curriculum,
    unfinished: UnfinishedAdapter,
    emit: Emit,
) -> Adapted:
    """Train an adapter; the model has it installed afterwards.

    Args:
        base: What it goes on.
        kind: Of adapter.
        options: How long, how fast, and those of the kind.
        curriculum: What is learned.
        unfinished: Takes how far it is, and has it if it was stopped.
        emit: Is told of it.

    Raises:
        DataError: nothing is left to learn from, or to look at.
        QtoolError: the kind of adapter doesn't go on this model.
    """
    loaded, model = base.loaded, base.loaded.model
    model.requires_grad_(requires_grad=False)
    pupil = _pupil(loaded, options)
    if options.packing:
        check_packing(pupil, curriculum, loaded.device)
    what = Adaptable(
        model=model,
        linears=quantized_linears(model, options.targets),
        original=base.original,
        exercises=curriculum.some(ANALYSED, loaded.device),
        surprise=pupil.surprise,
        tell=lambda text: emit(Progress(text)),
        seed=options.seed,
    )
    installed = kind.install(what, options.checked(kind))
    pupil = replace(pupil, parameters=installed.parameters)
    schedule = options.schedule(kind, curriculum.steps_per_epoch)
    pace = _Pace(curriculum, schedule, emit)
    parts = Parts(lambda sentence: emit(Fallback(sentence)))
    points = adapt_to(pupil, curriculum, schedule, pace.report, unfinished, parts)
    unfinished.write_curve(points)
    return Adapted(points, installed, pace.tokens_per_second)


def _pupil(loaded: LoadedModel, options: AdaptOptions) -> Pupil:
    """Return how a model runs while it learns; what of it learns isn't known yet."""
    model = loaded.model
    on_card = loaded.device.type == "cuda"
    large = num_weights(model) >= LARGE_MODEL
    if options.recompute or large:
        recompute_blocks(model, blocks_of(model))
    small = not (options.recompute or large or routes_tokens(model))
    return Pupil(
        model,
        (),
        autocast=torch.bfloat16 if on_card else None,
        captured=on_card and small,
        smoothing=options.label_smoothing,
    )


@torch.no_grad()
def check_packing(pupil: Pupil, curriculum: Curriculum, device: torch.device) -> None:
    """Refuse a model in which exercises of one row see each other, whatever they are told.

    Raises:
        DataError: it is one.
    """
    row = max(curriculum.exercises, key=lambda one: len(one.lengths))
    whole = owners([row], len(row.tokens))
    together = pupil.predicted(ExerciseBatch(row.tokens[None], row.labels[None], whole).to(device))
    each = (ExerciseBatch(tokens[None], tokens[None]) for tokens in row.tokens.split(row.lengths))
    alone = torch.cat([pupil.predicted(batch.to(device)) for batch in each], dim=1)
    if float((together - alone).norm() / alone.norm()) > SAME_LOGITS:
        raise DataError(
            f"Lines can't be packed for this model: it says something else of {len(row.lengths)} "
            "lines in one row than of each by itself. Leave out --packing."
        )


def num_weights(model: nn.Module) -> int:
    """Return how many weights a model has, quantized ones too."""
    quantized = (prod(m.entry.shape) for m in model.modules() if isinstance(m, QuantizedWeight))
    return sum(quantized) + sum(parameter.numel() for parameter in model.parameters())


def blocks_of(model: nn.Module) -> str:
    """Return the dotted name of the list of blocks: the one with the most quantized linears."""
    lists = (name for name, one in model.named_modules() if isinstance(one, nn.ModuleList))
    names = [n for n, one in model.named_modules() if isinstance(one, QuantizedLinear)]
    return max(lists, key=lambda name: sum(n.startswith(f"{name}.") for n in names))


def quantized_linears(model: nn.Module, targets: Sequence[str]) -> dict[str, QuantizedLinear]:
    """Return the quantized linears of a model that a glob names, in its order.

    Raises:
        RecipeError: a glob names none.
    """
    named = model.named_modules()
    known = {name: one for name, one in named if isinstance(one, QuantizedLinear)}
    for glob in targets:
        if not any(matches(name, glob) for name in known):
            first = next(iter(known), "none")
            raise RecipeError(
                f"--targets {shown(glob)} is no quantized linear's name; they are called such as "
                f"{first}, and * stands for anything."
            )
    return {name: one for name, one in known.items() if any(matches(name, t) for t in targets)}


def split_off(
    pieces: Sequence[Learned], share: float, most: int, seed: int
) -> tuple[list[Learned], list[Learned]]:
    """Return what is learned from, and what is held out: a share of all, at most so many.

    Raises:
        DataError: there are fewer than two.
    """
    if len(pieces) < 2:  # noqa: PLR2004 - one to learn from, one to look at
        raise DataError(
            f"The data has {len(pieces)} exercises that teach something; at least 2 are needed."
        )
    count = min(most, max(1, round(share * len(pieces))))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pieces), generator=generator).tolist()
    chosen = sorted(order[:count])
    rest = sorted(order[count:])
    return [pieces[index] for index in rest], [pieces[index] for index in chosen]


class _Pace:
    """Tells how far a run is, and how fast."""

    def __init__(self, curriculum: Curriculum, schedule: Schedule, emit: Emit) -> None:
        learned = sum(int((one.labels != NOT_LEARNED).sum()) for one in curriculum.exercises)
        self._per_step = learned / len(curriculum.exercises) * curriculum.batch
        self._schedule, self._emit = schedule, emit
        self._begun: tuple[int, float] | None = None
        self.tokens_per_second = 0.0

    def report(self, point: Point) -> None:
        """Take up a point of the curve."""
        now = time.perf_counter()
        if self._begun is None:
            self._begun = point.step, now
        steps, seconds = point.step - self._begun[0], now - self._begun[1]
        detail = f"loss {point.held_out:.4f} on held-out lines"
        if steps and seconds:
            self.tokens_per_second = steps * self._per_step / seconds
            detail += f", {self.tokens_per_second:,.0f} tokens/s"
        self._emit(Progress("adapt", point.step, self._schedule.steps, detail))
