"""Errors that a user can cause or repair.

The command line prints a `QtoolError` as one line and exits with 1; each kind of it stands below.
A message says what is wrong, where, what is allowed, and what to do next. What it is about stands
beside it, so that no program takes a message apart.
"""

import contextlib
import errno
import importlib.util
import re
from collections.abc import Iterator
from os import PathLike

DISTRIBUTION = "qtool-llm"
"""Its name as a package; the command and the import are `qtool`."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk."""


class QtoolError(Exception):
    """Base of all errors that the command line turns into one line."""

    def __init__(
        self,
        message: str = "",
        *,
        layer: str | None = None,
        file: str | PathLike[str] | None = None,
        key: str | None = None,
    ) -> None:
        """Keep the message and what it is about.

        Args:
            message: One line.
            layer: Dotted name of the layer.
            file: The file or directory.
            key: The key of a recipe, as users write it: weights.scheme.num_bits.
        """
        super().__init__(message)
        self.layer, self.file, self.key = layer, file, key

    def subject(self) -> dict[str, str]:
        """Return what it is about, as far as that is known: for logs."""
        known = {"layer": self.layer, "file": self.file, "key": self.key}
        return {name: str(value) for name, value in known.items() if value is not None}


@contextlib.contextmanager
def about(*, layer: str | None = None, file: str | PathLike[str] | None = None) -> Iterator[None]:
    """Give errors out of a block their subject, unless they know it better."""
    try:
        yield
    except QtoolError as error:
        error.layer, error.file = error.layer or layer, error.file or file
        raise


class RecipeError(QtoolError):
    """A recipe, an override or an option of a method is wrong."""


class SchemeError(QtoolError):
    """Impossible bits, group size or group dimension."""


class ModelError(QtoolError):
    """The source model can't be read or isn't what it must be."""


class DataError(QtoolError):
    """Text or calibration data is missing or unusable."""


class MethodError(QtoolError):
    """A solver refused a layer."""


class CheckpointError(QtoolError):
    """A written checkpoint is incomplete, damaged or too new."""


class OutputError(QtoolError):
    """The output directory can't be written."""


class BackendError(QtoolError):
    """No backend can execute a tensor here."""


class EngineError(QtoolError):
    """Workers can't be had, or end again and again."""


class UnknownNameError(QtoolError):
    """No plug-in of that name."""


class MissingExtraError(QtoolError):
    """An optional dependency isn't installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the '{extra}' extra. Run: {install_line(extra)}")


def require(what: str, extra: str, *modules: str) -> None:
    """Refuse what can't be done without modules; nothing is imported.

    Raises:
        MissingExtraError: one isn't installed; what the extra is for is said.
    """
    if not all(map(importlib.util.find_spec, modules)):
        raise MissingExtraError(what, extra)


def install_line(extra: str) -> str:
    """Return the command that installs what an extra requires and isn't here.

    It names the packages themselves: that works for a checkout as well as for a wheel.
    """
    wanted = _requirements(extra)
    if not wanted:
        return f"pip install -e '.[{extra}]' in qtool's checkout"
    missing = [line for line in wanted if not _is_installed(line)]
    return f"pip install {' '.join(repr(line) for line in missing or wanted)}"


def _requirements(extra: str) -> tuple[str, ...]:
    """Return what an extra requires, such as `lm-eval<0.5,>=0.4.12`; empty if that isn't known."""
    from importlib import metadata  # slow, and seldom asked

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # the source is run without being installed
        return ()
    wanted = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    return tuple(line.partition(";")[0].strip() for line in lines if wanted.search(line))


def _is_installed(requirement: str) -> bool:
    from importlib import metadata

    found = re.match(r"[\w.-]+", requirement)
    try:
        return found is not None and bool(metadata.version(found[0]))
    except metadata.PackageNotFoundError:
        return False
