"""Rendering: results to stdout, errors to stderr; `progress` has what comes between."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.errors import OutputError
from qtool.storage.plain_json import plain_json
from qtool.wording import reason

NOT_A_TERMINAL_WIDTH = 120
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
        raise OutputError(f"Can't write {target}: {reason(error)}.") from error


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
