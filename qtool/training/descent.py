"""The one loop that all tuning goes through: Adam along a falling rate; the best state is kept."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtool.core.parts import Parts, memory_is_full, slices, within_memory
from qtool.training.schedule import Point, Schedule, is_over
from qtool.training.student import LearnedLinear
from qtool.training.together import add_up, agreed, fellows, own_samples

BETAS = (0.9, 0.95)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What torch's Adam knows of each value."""
STEPS = "steps of tuning are taken"
"""Where memory is full in parts, whose gradients are summed: a sentence begins so."""
EAGER_STEPS = 3
"""Before a step is captured: libraries set themselves up."""


@dataclass(frozen=True, slots=True)
class Learning:
    """What is learned, and by what loss."""

    layers: Sequence[LearnedLinear]
    vectors: Sequence[nn.Parameter]
    """Norms and biases."""
    feed: Callable[[int], None]
    """Brings the data of a step to where `loss` reads them."""
    loss: Callable[[], Tensor]
    """Of what was fed last, differentiable."""
    held_out: Callable[[], float]
    """Loss on samples that aren't learned from."""
    captured: bool = False
    """On a card a step is one CUDA graph: all that is fed has one shape, `loss` never waits."""
    refine: Callable[[int, float], float] | None = None
    """At each look moves codes, if that helps: from the steps done, and the held-out loss, to what
    that is then."""
    share: Callable[[slice], Tensor] | None = None
    """Of the loss, what some samples make of it; those of all add up to it. None: a step is taken
    with all at once, or not at all."""
    samples: Callable[[], int] = lambda: 1
    """How many were fed last."""
    parts: Parts | None = None
    """That a step is taken in where memory is full, their gradients summed; None: it is whole."""
    parameters: Sequence[nn.Parameter] = ()
    """Whatever else learns, at the learning rate as it is."""
    after: Callable[[int], None] | None = None
    """Called after each step with how many are done; may change what learns, in place."""


class Memory(Protocol):
    """Where a descent that is stopped finds again how far it was."""

    def recall(self) -> tuple[Mapping[str, Tensor], Sequence[Point]] | None:
        """Return what was last kept; None: nothing."""
        ...

    def keep(self, state: Mapping[str, Tensor], points: Sequence[Point]) -> None:
        """Take the place of what was kept before."""
        ...


def descend(
    what: Learning,
    schedule: Schedule,
    report: Callable[[Point], None],
    memory: Memory | None = None,
) -> list[Point]:
    """Learn; what is learned ends where the held-out loss was least, which may be the start.

    Or where it was looked at last, if the schedule keeps that.

    A loss that isn't finite ends it early: what it did is taken back. With a memory it goes on
    where it was looked at last, to the same result.
    """
    stepper = Stepper(what, schedule)
    points = stepper.recall(memory)
    if not points:
        points = [
            Point(0, None, agreed(what.held_out()), schedule.learning_rate * schedule.factor(0))
        ]
        report(points[0])
    losses = list[Tensor]()
    for step in range(points[-1].step, schedule.steps):
        if is_over(points, schedule):
            break
        losses.append(_step(what, stepper, schedule, step))
        if (step + 1) % schedule.check_every and step + 1 < schedule.steps:
            continue
        trained, found = float(torch.stack(losses).mean()), agreed(what.held_out())
        if what.refine is not None and math.isfinite(found):
            found = what.refine(step + 1, found)
        if found < min(point.held_out for point in points):
            stepper.set_best()
        rate = schedule.learning_rate * schedule.factor(step)
        points.append(Point(step + 1, trained, found, rate))
        report(points[-1])
        losses.clear()
        if not math.isfinite(trained) or not math.isfinite(found):
            break
        if schedule.keeps == "last":
            stepper.set_best()
        if memory is not None:
            memory.keep(stepper.state(), points)
    stepper.go_to_best()
    return points


def _step(what: Learning, stepper: "Stepper", schedule: Schedule, step: int) -> Tensor:
    what.feed(step)
    loss = stepper.step(schedule.factor(step))
    if what.after is not None:
        what.after(step + 1)
    return loss


@contextmanager
def unchanged(what: Learning) -> Iterator[None]:
    """Make what is learned what it was before, afterwards."""
    values = _values(what)
    before = [value.detach().clone() for value in values]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, was in zip(values, before, strict=True):
                value.copy_(was)


class Stepper:
    """One step of Adam; on a card, after the first few, a graph that is replayed."""

    def __init__(self, what: Learning, schedule: Schedule) -> None:
        self._what, self._schedule = what, schedule
        groups = _groups(what, schedule)
        self._values = _values(what)
        self._rates = [float(group["lr"]) for group in groups]
        codes = [layer.codes for layer in what.layers] if what.refine is not None else []
        self._kept: list[Tensor] = [*self._values, *codes]
        device = self._values[0].device
        on_card = device.type == "cuda"
        self._captured, self._done = on_card and what.captured, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros((), device=device)
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
        self._optimizer = torch.optim.AdamW(
            groups,
            betas=BETAS,
            weight_decay=schedule.weight_decay,
            fused=on_card,
            capturable=on_card,
        )
        self.set_best()

    def step(self, factor: float) -> Tensor:
        """Take one, at this share of the rates; return the loss before it, not waited for."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"].fill_(rate * factor)
        self._done += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._captured and self._done > EAGER_STEPS and not self._in_parts():
            self._capture()
        else:
            self._loss = self._take()
        return self._loss.clone()

    def _in_parts(self) -> bool:
        """Return whether memory was full before: then there is none for a graph."""
        return self._what.parts is not None and self._what.parts.of(STEPS) > 1

    def _take(self) -> Tensor:
        what = self._what
        most = 1 if what.share is None else what.samples()
        return self._moved(within_memory(what.parts, STEPS, self._gradients, most=most))

    def _gradients(self, count: int) -> Tensor:
        """Set the gradients, summed over so many parts of the samples; return the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        what = self._what
        if what.share is None or (count == 1 and fellows() == 1):
            loss = what.loss()
            loss.backward()
            return loss.detach()
        total = torch.zeros_like(self._loss)
        own = own_samples(what.samples())
        for some in slices(own.stop - own.start, count):
            if some.start == some.stop:
                continue
            loss = what.share(slice(own.start + some.start, own.start + some.stop))
            loss.backward()
            total += loss.detach()
        return total

    def _moved(self, loss: Tensor) -> Tensor:
        if self._what.share is not None:
            loss = add_up(loss, self._values)
        nn.utils.clip_grad_norm_(self._values, self._schedule.max_norm)
        self._optimizer.step()
        return loss

    def _capture(self) -> None:
        """Record a step, and take it; one that can't be recorded is taken as it is, from now on."""
        what, graph = self._what, torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._loss = self._moved(self._gradients(1))
        except RuntimeError as error:  # it waits for the card, reads from the host, or takes a lot
            if memory_is_full(error) and what.parts is None:
                raise
            self._captured = False
        if self._captured:
            graph.replay()
            self._graph = graph
        else:
            del graph
            self._loss = self._take()

    def set_best(self) -> None:
        """Keep what is learned as it is now."""
        self._best = [value.detach().clone() for value in self._kept]

    @torch.no_grad()
    def go_to_best(self) -> None:
        """Make what is learned what was kept."""
        for value, best in zip(self._kept, self._best, strict=True):
            value.copy_(best)

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, and what was kept; not to be written to."""
        found: dict[str, Tensor] = {}
        for index, (value, best) in enumerate(zip(self._kept, self._best, strict=True)):
            found |= {f"{index}.value": value.detach(), f"{index}.best": best}
        for index, value in enumerate(self._values):
            # What has had no gradient yet, as a norm before a signal of the original's, has none.
            moments = self._optimizer.state.get(value, {})
            found |= {f"{index}.{name}": moments[name] for name in MOMENTS if name in moments}
        return found

    @torch.no_grad()
    def recall(self, memory: Memory | None) -> list[Point]:
        """Go back to what was kept, and return its curve; empty: nothing was."""
        kept = None if memory is None else memory.recall()
        if kept is None:
            return []
        state, points = kept
        for index, (value, best) in enumerate(zip(self._kept, self._best, strict=True)):
            value.copy_(state[f"{index}.value"])
            best.copy_(state[f"{index}.best"])
        for index, value in enumerate(self._values):
            if f"{index}.{MOMENTS[0]}" in state:
                moments = {name: state[f"{index}.{name}"].to(value.device) for name in MOMENTS}
                self._optimizer.state[value] = moments
        return list(points)


def _values(what: Learning) -> list[nn.Parameter]:
    """Return all that Adam moves, in the order of its groups."""
    moves = [move for layer in what.layers for move in layer.moves.values()]
    shifts = [layer.shifts for layer in what.layers if layer.shifts is not None]
    return [*moves, *what.parameters, *what.vectors, *shifts]


def _groups(what: Learning, schedule: Schedule) -> list[dict[str, Any]]:
    moves = [move for layer in what.layers for move in layer.moves.values()]
    moves += what.parameters
    groups: list[dict[str, Any]] = [{"params": moves, "lr": schedule.learning_rate}]
    steps = [2 / (2**layer.scheme.num_bits - 1) for layer in what.layers]
    coarseness = fmean(steps) if steps else 1.0
    for vector in what.vectors:
        size = float(vector.detach().square().mean().sqrt()) or 1.0
        groups.append({"params": [vector], "lr": schedule.learning_rate * coarseness * size})
    shifts = [layer.shifts for layer in what.layers if layer.shifts is not None]
    if shifts:
        groups.append({"params": shifts, "lr": schedule.code_rate})
    return groups
