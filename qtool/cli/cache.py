"""`qtool cache`."""

import contextlib
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import console
from qtool.cli.options import JsonOption, check_targets
from qtool.errors import OutputError
from qtool.modeling.demo import DEMO_MODELS
from qtool.settings import cache_dir
from qtool.storage.store import Kept, Store
from qtool.storage.whole_files import remove_entry
from qtool.wording import gigabytes, reason

IN_STORE = {
    "answers": "of tasks that didn't end",
    "scores": "of tasks, with what was asked and answered",
    "prices": "of the bits of each layer, for --average-bits",
    "digests": "of files, so that models aren't read again to be told apart",
}
FOLDERS = {
    "gguf": "models of GGUF files, as float16",
    "imported": "checkpoints of models that other programs have quantized",
    "demo": "the demo model's file",
    "cuda": "kernels compiled for a card, that CuPy doesn't keep",
}
HALF_KEPT = r"(\.[0-9a-f]{12}\.partial)?"
KEPT_NAMES = {
    "gguf": re.compile(r"[0-9a-f]{32}(\.partial|\.lock)?"),
    "imported": re.compile(r"[0-9a-f]{32}(\.lock)?"),
    "demo": re.compile(
        rf"({'|'.join(re.escape(d.file) for d in DEMO_MODELS.values())}){HALF_KEPT}|tmp\w{{8}}"
    ),
    "cuda": re.compile(rf"[0-9a-f]{{64}}\.cubin{HALF_KEPT}"),
}
"""Names of what qtool makes there: the cache may lie in a folder that has a user's own things."""
ALL = IN_STORE | FOLDERS
UNITS = {"days": 86_400, "hours": 3_600, "minutes": 60}


def cache(
    what: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(ALL)}; default: all.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove it; models only if they are named.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """List what is kept to be faster the next time, or clear it.

    [bold]Examples[/bold]

      qtool cache

      qtool cache --clear answers scores
    """
    check_targets([json_file])
    unknown = [name for name in what or () if name not in ALL]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} isn't kept; give some of {', '.join(ALL)}.")
    if clear:
        _clear(what or list(IN_STORE))
    with Store() as store:
        found = [*store.summary(), *(_folder(name) for name in FOLDERS)]
    found = [kept for kept in found if kept.entries and kept.kind in (what or [kept.kind])]
    report = {"folder": str(cache_dir()), "kept": [asdict(kept) for kept in found]}
    if console.write_json(report, json_file):
        rows = [(k.kind, ALL.get(k.kind, ""), str(k.entries), *_size_and_age(k)) for k in found]
        columns = ("what", "", ">entries", ">size", ">age")
        console.print_table(str(cache_dir()), columns, rows)


def _size_and_age(kept: Kept) -> tuple[str, str]:
    """Return size, and how long ago the oldest and the newest were added."""
    first, last = (_ago(time.time() - at) for at in (kept.first, kept.last))
    return gigabytes(kept.num_bytes), first if first == last else f"{last} to {first}"


def _ago(seconds: float) -> str:
    for unit, length in UNITS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _folder(name: str) -> Kept:
    """Return what a folder of models has."""
    entries = [entry for entry in _ours(name) if entry.suffix != ".lock"]
    files = [file for entry in entries for file in (entry, *entry.rglob("*")) if file.is_file()]
    times = [entry.stat().st_mtime for entry in entries] or [0.0]
    size = sum(file.stat().st_size for file in files)
    return Kept(name, len(entries), size, min(times), max(times))


def _ours(name: str) -> list[Path]:
    """Return what qtool has made in a folder of models."""
    entries = (cache_dir() / name).glob("*")
    return [entry for entry in entries if KEPT_NAMES[name].fullmatch(entry.name)]


def _clear(names: list[str]) -> None:
    try:
        with Store() as store:
            store.clear([name for name in names if name in IN_STORE])
        for name in FOLDERS.keys() & {*names}:
            for entry in _ours(name):
                remove_entry(entry)
            with contextlib.suppress(OSError):  # there is none, or it has what isn't ours
                (cache_dir() / name).rmdir()
    except OSError as error:
        raise OutputError(f"Can't clear {cache_dir()}: {reason(error)}.") from error
