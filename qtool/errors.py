"""Errors that a user can cause or repair.

QtoolError                 base; the CLI prints it as one line and exits with 1
├── RecipeError            a recipe, an override or an option of a method is wrong
├── SchemeError            impossible bits, group size or group dimension
├── ModelError             the source model can't be read or isn't what it must be
├── DataError              text or calibration data is missing or unusable
├── MethodError            a solver refused a layer (NaN weights, singular statistics)
├── CheckpointError        a written checkpoint is incomplete, damaged or too new
├── OutputError            the output directory can't be written
├── BackendError           no backend can execute a tensor here
├── MissingExtraError      an optional dependency isn't installed
├── NotYetError            a later version brings this
└── UnknownNameError       no plug-in of that name

A message says what is wrong, where, what is allowed, and what to do next.
"""

from qtool.extras import install_line


class QtoolError(Exception):
    """Base of all errors that the command line turns into one line."""


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


class MissingExtraError(QtoolError):
    """An optional dependency isn't installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the '{extra}' extra. Run: {install_line(extra)}")


class NotYetError(QtoolError):
    """A later version brings this."""


class UnknownNameError(QtoolError):
    """No plug-in of that name."""
