"""What a run warned of, and did in smaller parts because memory was full: kept over a stop."""

from dataclasses import replace

from qtool.base import Fallback, Notice, Progress
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.parts import Parts
from qtool.steps.run import Run

FALLBACKS, WARNINGS = "fallbacks", "warnings"
"""Drafts: the sentences, under the name of the blocks."""


def keeping_sentences(run: Run, writer: CheckpointWriter) -> Run:
    """Return the run that does in parts what memory is full for, and keeps what it says."""
    emit, name = run.env.emit, run.source.adapter.blocks

    def add(message: str, draft: str) -> None:
        sentences = dict.fromkeys([*_kept(run, writer, draft), message])
        writer.keep(name, Made({}, {"sentences": list(sentences)}), draft=draft)

    def keep(event: Progress | Notice) -> None:
        if isinstance(event, Fallback):
            add(event.message, FALLBACKS)
        if isinstance(event, Notice):
            add(event.message, WARNINGS)
        emit(event)

    parts = Parts(lambda message: keep(Fallback(message)))
    return replace(run, env=replace(run.env, emit=keep, parts=parts))


def kept_fallbacks(run: Run, writer: CheckpointWriter) -> tuple[str, ...]:
    """Return the sentences of this run and of what it resumed."""
    return _kept(run, writer, FALLBACKS)


def kept_warnings(run: Run, writer: CheckpointWriter) -> tuple[str, ...]:
    """Return what was warned of since layers were decided, by this run and what it resumed."""
    return _kept(run, writer, WARNINGS)


def _kept(run: Run, writer: CheckpointWriter, draft: str) -> tuple[str, ...]:
    return tuple(writer.notes(run.source.adapter.blocks, draft=draft).get("sentences", ()))
