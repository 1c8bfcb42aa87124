"""Rendering of events on stderr: one live line on a terminal, dated lines in a log."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
from rich.progress import Progress as Bars
from rich.text import Text

from qtool.base import Notice, Progress
from qtool.cli.console import err
from qtool.cli.interrupts import was_interrupted

LOG_SECONDS = 30.0
"""Between two lines of progress in a log."""
FIRST_SECONDS = 5.0
"""After which a log gets the first line on how far something is."""


@dataclass(slots=True)
class Step:
    """What is going on: a phase, or something that is counted."""

    label: str
    begun: float
    total: int | None = None
    done: int = 0
    detail: str = ""
    ends: float | None = None
    """When all is done, by a first guess; None: nobody has guessed."""

    def state(self, now: float) -> str:
        """Return how far it is, since when, and how much time is left."""
        spent = f"{clock(now - self.begun)} so far"
        if not self.total:
            return f"{self.done}, {spent}" if self.done else f"{spent}, {self.guess(now)}"
        if self.done >= self.total:  # what comes next says so itself
            return f"{self.done} of {self.total}, {spent}"
        left = self.guess(now)
        if self.done:
            seconds = (now - self.begun) / self.done * (self.total - self.done)
            left = f"about {clock(seconds)} left"
        return f"{self.done} of {self.total}, {spent}, {left}"

    def line(self, now: float) -> str:
        """Return all that is said of it."""
        return f"{self.label}: {self.state(now)}  {self.detail}".rstrip()

    def guess(self, now: float) -> str:
        """Return what is said of the time left before anything is counted."""
        if self.ends is None or self.ends <= now:
            return "estimating the time left" if self.total else "time left not known yet"
        return f"about {clock(self.ends - now)} left by a first guess"


class _Log:
    """Writes a line at the start of a phase, and where one is due."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.last, self.wait = time.monotonic(), FIRST_SECONDS

    def show(self, step: Step) -> None:
        """Take up what is going on now."""
        if step is not self.step:
            self.step, self.wait = step, FIRST_SECONDS
            if step.total is None and not step.done:
                self.last = time.monotonic()
                self._print(f"{step.label}, {step.guess(self.last)}" if step.ends else step.label)
        self.tick()

    def tick(self) -> None:
        """Write how far it is, if nothing was written for long."""
        step, now = self.step, time.monotonic()
        if step is not None and now - self.last >= self.wait:
            self.last, self.wait = now, LOG_SECONDS
            self._print(step.line(now))

    def _print(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class _State(ProgressColumn):
    """How far the live line's step is."""

    def render(self, task: Task) -> Text:
        """Return it as of now."""
        return Text(task.fields["step"].line(time.monotonic()))


@dataclass(slots=True)
class _Live:
    """Keeps one line of a terminal up to date."""

    bars: Bars
    step: Step | None = None

    def show(self, step: Step) -> None:
        """Take up what is going on now."""
        if step is not self.step:
            self.step = step
            for task in self.bars.task_ids:
                self.bars.remove_task(task)
            self.bars.add_task("", total=step.total, step=step)
        self.bars.update(self.bars.task_ids[0], completed=step.done)


class Told:
    """What a command emits to: it shows what goes on, and prints warnings."""

    def __init__(self, view: "_Log | _Live") -> None:
        self._view = view
        self._step, self._last = Step("", time.monotonic()), time.monotonic()

    def __call__(self, event: Progress | Notice) -> None:
        """Show an event."""
        if isinstance(event, Notice):
            err.print(f"Warning: {escape(event.message)}", soft_wrap=True)
            return
        now = time.monotonic()
        if event.total is None:
            self._step = Step(event.what, now, ends=self._step.ends)
        elif event.what != self._step.label or event.done < self._step.done:  # no guess is needed
            begun = self._last if event.done else now  # what is done was done since the last event
            self._step = Step(event.what, begun, total=event.total)
        self._last = now
        self._step.done, self._step.detail = event.done, event.detail
        self._view.show(self._step)

    def guess(self, seconds: float) -> None:
        """Take a first guess of how long all takes; it stands until something is counted."""
        self._step.ends = time.monotonic() + seconds
        self._view.show(self._step)


@contextmanager
def progress(kept: str = "") -> Iterator[Told]:
    """Render events while a command works; yields what to emit to.

    Args:
        kept: What becomes of the work if it is interrupted, as a sentence.

    Raises:
        KeyboardInterrupt: with `kept`.
    """
    with _renderer() as view:
        try:
            yield Told(view)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept) from None
        except Exception:
            if was_interrupted():  # it is what a library made of that
                raise KeyboardInterrupt(kept) from None
            raise


@contextmanager
def _renderer() -> Iterator[_Live | _Log]:
    if err.is_terminal:
        columns = (SpinnerColumn(), BarColumn(bar_width=20), _State())
        with Bars(*columns, console=err, transient=True) as bars:
            yield _Live(bars)
        return
    log, stopped = _Log(), threading.Event()

    def watch() -> None:
        while not stopped.wait(1.0):
            log.tick()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield log
    finally:
        stopped.set()
        watcher.join()


def clock(seconds: float) -> str:
    """Return 75 as 1:15, and hours before."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
