"""A result neither lies in what it is made from nor replaces it. Torch-free."""

from collections.abc import Iterable
from pathlib import Path

from qtool.checkpoint.place import file_failures
from qtool.errors import OutputError


def check_apart(out_dir: Path, source: Path, others: Iterable[Path] = ()) -> None:
    """Check that a result isn't in the model's directory, nor what is read in the result's.

    Args:
        out_dir: Where the result goes.
        source: Directory of the model, or its GGUF file.
        others: What else is read.

    Raises:
        OutputError: it is; links are followed both ways.
    """
    with file_failures(out_dir):
        itself = _identity(out_dir)
        if _identity(source) in _identities_above(out_dir):
            raise OutputError(
                f"{out_dir} is the model that is read, or lies in it. Name a directory elsewhere."
            )
        files = source.iterdir() if source.is_dir() else ()
        for path in (source, *files, *others):
            if itself is not None and itself in _identities_above(path.resolve()):
                raise OutputError(
                    f"{path} is read by this run, and lies in {out_dir}, which it would write. "
                    "Name another directory."
                )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities_above(path: Path) -> set[tuple[int, int] | None]:
    return {_identity(one) for one in (path, *path.parents)} - {None}
