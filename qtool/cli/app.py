"""The Typer app; a QtoolError becomes one line and exit code 1."""

import logging
import os
import sys

import typer

from qtool.cli.bench import bench
from qtool.cli.calibrate import calibrate
from qtool.cli.console import print_error
from qtool.cli.doctor import doctor
from qtool.cli.evaluate import evaluate
from qtool.cli.inspect import inspect, methods, recipes
from qtool.cli.quantize import quantize
from qtool.errors import QtoolError, UnknownNameError
from qtool.plugins import describe_miss

INTERRUPTED = 130
LOG_LEVELS = ("debug", "info", "warning")
FIRST_STEPS = """[bold]First steps[/bold]

  qtool quantize --method bcq --bits 4 demo:smollm2 smollm2-w4

  qtool eval smollm2-w4 --baseline demo:smollm2 --windows 8
"""

app = typer.Typer(
    name="qtool",
    help="Quantize language models to 1-8 bits, measure what is left of them, and run them.",
    epilog=FIRST_STEPS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals are tensors
)
app.command("calibrate")(calibrate)
app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("methods")(methods)
app.command("recipes")(recipes)
app.command("doctor")(doctor)


def _version(value: bool) -> None:
    if value:
        from qtool import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Quantize language models to 1-8 bits, measure what is left of them, and run them."""
    del version


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a qtool error, 2 usage, 130 interrupted."""
    try:
        _log()
        app()
    except QtoolError as error:
        logging.getLogger(__name__).debug("Where it comes from:", exc_info=True)
        print_error(str(error))
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            print_error(
                "Interrupted. What is done is kept: `qtool quantize ... --resume` goes on with the "
                "next layer, `qtool eval --tasks` with the next requests."
            )
        raise


def _log() -> None:
    """Log qtool to stderr, tracebacks of errors included, if $QTOOL_LOG says so.

    Raises:
        UnknownNameError: it isn't a level.
    """
    level = os.environ.get("QTOOL_LOG", "").lower()
    if not level:
        return
    if level not in LOG_LEVELS:
        raise UnknownNameError(describe_miss(level, LOG_LEVELS, "levels of $QTOOL_LOG"))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("qtool").setLevel(level.upper())
