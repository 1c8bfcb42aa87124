"""What a run did in smaller parts because memory was full, kept over a stop for its report."""

from dataclasses import replace

from qtool.base import Fallback, Notice, Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.parts import Parts
from qtool.steps.run import Run

FALLBACKS = "fallbacks"
"""Draft: the sentences, under the name of the blocks."""


def keeping_fallbacks(run: Run, writer: CheckpointWriter) -> Run:
    """Return the run that does in parts what memory is full for, and keeps that it did."""
    emit, name = run.env.emit, run.source.adapter.blocks

    def keep(event: Progress | Notice) -> None:
        if isinstance(event, Fallback):
            sentences = dict.fromkeys([*kept_fallbacks(run, writer), event.message])
            writer.keep(name, Made({}, {"sentences": list(sentences)}), draft=FALLBACKS)
        emit(event)

    parts = Parts(lambda message: keep(Fallback(message)))
    return replace(run, env=replace(run.env, emit=keep, parts=parts))


def kept_fallbacks(run: Run, writer: CheckpointWriter) -> tuple[str, ...]:
    """Return the sentences of this run and of what it resumed."""
    notes = writer.notes(run.source.adapter.blocks, draft=FALLBACKS)
    return tuple(notes.get("sentences", ()))
