"""`report`: what runs have left behind, as one page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qtool.checkpoint.marks import PAGE_NAME
from qtool.errors import OutputError
from qtool.report.page.evidence import Evidence
from qtool.report.page.reading import read_evidence, swept
from qtool.report.page.render import PAGE_MARK, page
from qtool.storage.whole_files import written_whole
from qtool.wording import reason


def report(
    directories: Sequence[Path],
    output: Path | None = None,
    measured: Sequence[Path] = (),
) -> Path:
    """Write the page of one run, or of several side by side, and return where it is.

    Args:
        directories: Results of runs; the directory of a sweep stands for all its sizes.
        output: Where the page goes; None: into the first directory.
        measured: Results of `qtool eval --json` and `qtool bench --json` that lie elsewhere, of the
            one directory.

    Raises:
        OutputError: there is nothing of a run, or the page can't be written.
        MissingExtraError: jinja2 or matplotlib isn't installed.
    """
    target = output or directories[0] / PAGE_NAME
    many = [run for directory in directories for run in _runs(directory, measured)]
    _check_ours(target)
    content = page(many)
    try:
        with written_whole(target) as file:
            file.write(content)
    except OSError as error:
        raise OutputError(f"Can't write {target}: {reason(error)}. Give --output.") from error
    return target


def _runs(directory: Path, measured: Sequence[Path]) -> list[Evidence]:
    """Return the evidence of a directory, or of all sizes of a sweep."""
    sizes = swept(directory)
    if not sizes:
        return [read_evidence(directory, measured)]
    return [replace(read_evidence(path), swept=row) for path, row in sizes.items()]


def _check_ours(target: Path) -> None:
    """Refuse to replace what isn't a page of an earlier call."""
    try:
        with target.open("rb") as opened:
            is_ours = opened.read(len(PAGE_MARK)) == PAGE_MARK
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"Can't write {target}: {reason(error)}. Give --output.") from error
    if not is_ours:
        raise OutputError(
            f"Can't write {target}: it is there, and isn't a page of `qtool report`. Remove it "
            "yourself, or give another file with --output."
        )
