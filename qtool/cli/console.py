"""Rendering: results to stdout, errors to stderr; `progress` has what comes between."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.checkpoint.marks import foreign_entries, is_checkpoint
from qtool.errors import OutputError
from qtool.storage.plain_json import json_text
from qtool.storage.whole_files import written_over
from qtool.wording import reason

RESULTS = (b"{\n", b'{"', b"{}", b"|", b"- ", b"\x1f\x8b", b"\x89PNG", b"<?xml")
"""How files begin that a command writes: JSON, a table in Markdown, gzip, a plot."""
NOT_A_TERMINAL_WIDTH = 120
out = Console(width=None if sys.stdout.isatty() else NOT_A_TERMINAL_WIDTH, highlight=False)
err = Console(stderr=True, highlight=False)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table to stdout; a header written as `>name` has its column at the right."""
    table = Table(header_style="bold")
    for name in columns:
        side: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        table.add_column(escape(name.removeprefix(">")), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    if title:
        out.print(f"[bold]{escape(title)}[/bold]")
    out.print(table)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines to stdout; no markup."""
    for line in lines:
        out.print(line, markup=False)


def write_json(value: object, target: Path | None) -> bool:
    """Write a result for machines; '-' is stdout, None is nowhere.

    Returns:
        Whether stdout is free for a table.
    """
    if target is not None:
        write_text(json_text(value), target)
    return str(target) != "-"


def write_text(text: str, target: Path) -> None:
    """Write a result and a line break; '-' is stdout.

    Raises:
        OutputError: it can't be written, or would replace what is no result.
    """
    if str(target) == "-":
        print(text)
        return
    try:
        check_replaceable(target)
        with written_over(target) as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise OutputError(f"Can't write {target}: {reason(error)}.") from error


def check_replaceable(target: Path) -> None:
    """Refuse a file that belongs to a model or to calibration data, or looks like no result.

    Raises:
        OutputError: it is such a file.
    """
    file = Path(os.path.realpath(target))  # resolve() raises on a link in a circle
    if not file.is_file() or not file.stat().st_size:
        return
    folders = [folder for folder in file.parents if is_checkpoint(folder)]
    part = any(
        file.relative_to(folder).as_posix() not in foreign_entries(folder) for folder in folders
    )
    if not folders:
        part = any((file.parent / name).is_file() for name in ("config.json", "calibration.json"))
    if part:
        raise OutputError(
            f"Can't write {target}: it belongs to the model or the data there, and would be "
            "replaced. Give another file."
        )
    with file.open("rb") as opened:
        begin = opened.read(8)
    if not begin.startswith(RESULTS):
        raise OutputError(
            f"Can't write {target}: it is there, and isn't the result of an earlier run. Remove it "
            "yourself, or give another file."
        )
