"""What a run warned of, and did in smaller parts because memory was full: kept over a stop."""

from dataclasses import replace

from qtool.base import Fallback, Notice, Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import WARNINGS, CheckpointWriter
from qtool.core.parts import Parts
from qtool.steps.run import Run

FALLBACKS = "run", "fallbacks"
"""Name and draft, as `WARNINGS`: the sentences."""


def keeping_sentences(run: Run, writer: CheckpointWriter) -> Run:
    """Return the run that does in parts what memory is full for, and keeps what it says."""
    emit = run.env.emit

    def add(message: str, kind: tuple[str, str]) -> None:
        sentences = dict.fromkeys([*_kept(writer, kind), message])
        writer.keep(kind[0], Made({}, {"sentences": list(sentences)}), draft=kind[1])

    def keep(event: Progress | Notice) -> None:
        if isinstance(event, Fallback):
            add(event.message, FALLBACKS)
        if isinstance(event, Notice):
            add(event.message, WARNINGS)
        emit(event)

    parts = Parts(lambda message: keep(Fallback(message)))
    return replace(run, env=replace(run.env, emit=keep, parts=parts))


def kept_fallbacks(writer: CheckpointWriter) -> tuple[str, ...]:
    """Return the sentences of this run and of what it resumed."""
    return _kept(writer, FALLBACKS)


def kept_warnings(writer: CheckpointWriter) -> tuple[str, ...]:
    """Return what was warned of since layers were decided, by this run and what it resumed."""
    return _kept(writer, WARNINGS)


def _kept(writer: CheckpointWriter, kind: tuple[str, str]) -> tuple[str, ...]:
    return tuple(writer.notes(kind[0], draft=kind[1]).get("sentences", ()))
