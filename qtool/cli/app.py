"""The Typer app; whatever goes wrong becomes one line, see `outcome`."""

import typer

from qtool.cli.bench import bench
from qtool.cli.cache import cache
from qtool.cli.calibrate import calibrate
from qtool.cli.doctor import doctor
from qtool.cli.evaluate import evaluate
from qtool.cli.inspect import inspect, methods, recipes
from qtool.cli.options import Command
from qtool.cli.outcome import run
from qtool.cli.quantize import quantize

FIRST_STEPS = """[bold]First steps[/bold]

  qtool quantize --method bcq --bits 4 demo:smollm2 smollm2-w4

  qtool eval smollm2-w4 --baseline demo:smollm2 --windows 8
"""

app = typer.Typer(
    name="qtool",
    help="Quantize language models to 1-8 bits, measure what is left of them, and run them.",
    epilog=FIRST_STEPS,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals are tensors
)
app.command("calibrate", cls=Command)(calibrate)
app.command("quantize", cls=Command)(quantize)
app.command("eval", cls=Command)(evaluate)
app.command("bench", cls=Command)(bench)
app.command("inspect", cls=Command)(inspect)
app.command("methods", cls=Command)(methods)
app.command("recipes", cls=Command)(recipes)
app.command("cache", cls=Command)(cache)
app.command("doctor", cls=Command)(doctor)


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
    run(app)
