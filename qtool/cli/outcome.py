"""What a command ends with: its exit code, and one line where something is wrong."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from qtool import settings
from qtool.cli.interrupts import noted_interrupts, was_interrupted
from qtool.errors import FULL, QtoolError

INTERRUPTED = 130
LOG_LEVELS = ("debug", "info", "warning")
FULL_MEMORY = ("CUDA out of memory", "can't allocate memory", "CUDA error: out of memory")


def run(app: Callable[[], object]) -> None:
    """Run the command line; exits with 1 after one line for whatever it raises.

    A traceback of it goes to the log, with QTOOL_LOG=debug.
    """
    try:
        _prepare(sys.stdout)
        _prepare(sys.stderr)
        _log()
        try:
            with noted_interrupts():
                app()
        finally:
            sys.stdout.flush()  # a full disk shows here, while something can still be said
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            print_error(f"Interrupted. {_kept(stop)}")
        raise
    except KeyboardInterrupt:
        print_error("Interrupted.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        sys.exit(1)
    except Exception as error:  # a user can do nothing with a traceback
        if was_interrupted():
            print_error("Interrupted.")
            sys.exit(INTERRUPTED)
        about = error.subject() if isinstance(error, QtoolError) else {}
        logging.getLogger(__name__).debug("Where it comes from: %s", about, exc_info=True)
        print_error(explain(error))
        sys.exit(1)


def print_error(message: str) -> None:
    """Print one line to stderr; no markup, no wrapping."""
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)


def explain(error: Exception) -> str:
    """Return what to tell a user about an error that nothing below has explained."""
    if isinstance(error, QtoolError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        where = f" where {error.filename} is" if error.filename else ""
        return f"The disk is full{where}. Free some space and give the same command again."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} can't be read or written: {error.strerror}."
    if isinstance(error, MemoryError) or _is_full_memory(error):
        return (
            "Out of memory. Use a machine or card with more of it, --device cpu in place of a "
            "card, or fewer tokens at a time: calibration.num_samples, --context-length."
        )
    return (
        f"Internal error, a bug of qtool: {type(error).__name__}: {error}. Please report it, with "
        "what the same command prints under QTOOL_LOG=debug."
    )


def _is_full_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in FULL_MEMORY)
    )


def _kept(stop: BaseException) -> str:
    """Return what the command said of its work, which the KeyboardInterrupt carries."""
    cause = stop.__cause__ or stop.__context__
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return " ".join(map(str, cause.args))
        cause = cause.__cause__ or cause.__context__
    return ""


def _prepare(stream: TextIO) -> None:
    """Let names be printed that a terminal's encoding doesn't have."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _log() -> None:
    """Log qtool to stderr, tracebacks of errors included, if $QTOOL_LOG says so."""
    level = settings.log_level()
    if not level:
        return
    from qtool.plugins import check_name

    check_name(level, LOG_LEVELS, "levels of $QTOOL_LOG")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("qtool").setLevel(level.upper())
