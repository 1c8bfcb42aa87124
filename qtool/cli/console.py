"""Rendering: results to stdout, progress and errors to stderr."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qtool.base import Emit
from qtool.errors import OutputError
from qtool.storage.plain_json import plain_json

NOT_A_TERMINAL_WIDTH = 120
LOG_SECONDS = 30.0
"""Between two lines of progress in a log."""
out = Console(width=None if sys.stdout.isatty() else NOT_A_TERMINAL_WIDTH, highlight=False)
err = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """Print one line to stderr; no markup, no wrapping."""
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)


def print_table(title: str, columns: Mapping[str, str], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table to stdout; `columns` maps each header to its alignment."""
    table = Table(header_style="bold")
    for name, justify in columns.items():
        table.add_column(escape(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    if title:
        out.print(f"[bold]{escape(title)}[/bold]")
    out.print(table)


def write_json(value: Any, target: Path | None) -> None:  # noqa: ANN401
    """Write a result for machines; '-' is stdout, None is nowhere."""
    if target is None:
        return
    write_text(json.dumps(plain_json(value), indent=2, allow_nan=False), target)


def write_text(text: str, target: Path) -> None:
    """Write a result and a line break; '-' is stdout.

    Raises:
        OutputError: it can't be written.
    """
    if str(target) == "-":
        print(text)
        return
    try:
        target.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"Can't write {target}: {error.strerror}.") from error


def wants_table(json_target: Path | None) -> bool:
    """Return whether stdout is free for the table."""
    return str(json_target) != "-"


def gigabytes(num_bytes: float) -> str:
    """Return a size as people write it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def compact(average_bits: float) -> str:
    """Return bits per weight."""
    return f"{average_bits:.2f}"


@contextmanager
def progress() -> Iterator[Emit]:
    """Render events as progress bars with the time left; yields what to emit to.

    Where stderr isn't a terminal, it gets a line now and then instead.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,  # else a log gets an empty line before each error
    )
    tasks: dict[str, Any] = {}
    last_line = time.monotonic()

    def emit(event: str, values: Mapping[str, Any]) -> None:
        nonlocal last_line
        if event == "warning":
            err.print(f"Warning: {escape(values['message'])}", soft_wrap=True)  # one line in a log
            return
        describe = DESCRIPTIONS.get(event)
        if describe is None:
            return
        label, detail = describe(values)
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=values.get("total"), detail="")
        done = values.get("index", -1) + 1
        bars.update(tasks[label], completed=done, detail=detail)
        if bars.disable and time.monotonic() - last_line >= LOG_SECONDS:
            last_line = time.monotonic()
            of = f" of {values['total']}" if values.get("total") else ""
            print(f"{label}: {done}{of}  {detail}".rstrip(), file=sys.stderr, flush=True)

    with bars:
        yield emit


def _layer(values: Mapping[str, Any]) -> tuple[str, str]:
    memory = gigabytes(values["memory"])
    return "quantize", f"{values['name']}  error {values['error']:.2e}  memory {memory}"


def _window(values: Mapping[str, Any]) -> tuple[str, str]:
    return f"perplexity of {values['name']}", f"{values['perplexity']:.3f}"


def _timing(values: Mapping[str, Any]) -> tuple[str, str]:
    return f"time {values['name']}", ""


def _block(values: Mapping[str, Any]) -> tuple[str, str]:
    return "measure inputs", str(values["name"])


def _request(values: Mapping[str, Any]) -> tuple[str, str]:
    return f"{values['task']} of {values['name']}", ""


def _reference(values: Mapping[str, Any]) -> tuple[str, str]:
    return f"predictions of {values['name']}", ""


DESCRIPTIONS = {
    "agreement": _reference,
    "block": _block,
    "layer": _layer,
    "reference": _reference,
    "request": _request,
    "timing": _timing,
    "window": _window,
}
