"""The Typer app: a command is imported when it is run, so that `qtool --help` answers at once."""

import importlib
from typing import Any

import typer
import typer.core
import typer.main

from qtool.cli.outcome import run

FIRST_STEPS = """[bold]First steps[/bold]

  qtool quantize --method bcq --bits 4 demo:smollm2 smollm2-w4

  qtool eval smollm2-w4 --baseline demo:smollm2 --windows 8
"""
COMMANDS = {
    "calibrate": "Draw calibration samples, with the prompt lengths of the target tasks if asked.",
    "quantize": "Quantize a model and write a checkpoint.",
    "eval": "Measure quality: tasks of lm-eval, or perplexity and closeness to the original.",
    "bench": "Time a checkpoint against its original, in one run, and print sizes and bits.",
    "serve": "Serve a model by the API that OpenAI's clients speak.",
    "chat": "Talk with a model in the terminal, or send it the lines of a pipe.",
    "adapt": "Adapt a checkpoint to a task: planes stay, an adapter of a few numbers is trained.",
    "train": "Train a checkpoint to follow its original: quantization-aware training.",
    "compare": "Compare any number of models with the first: texts, KL divergence, tasks.",
    "run": "Carry out a recipe: quantize, measure, and exit with 3 if a gate fails.",
    "grid": "Recipes x models, and tasks x these and what was made of them, shared among workers.",
    "report": "Show what runs have found out as one HTML page, which needs no network.",
    "export": "Write a checkpoint in the format of another program, and compare it bit by bit.",
    "import": "Import a model that another program has quantized, without loss.",
    "inspect": "Check a checkpoint and print what it holds.",
    "methods": "List the methods and their options.",
    "recipes": "List the built-in recipes.",
    "cache": "List what is kept to be faster the next time, or clear it.",
    "doctor": "Print what is installed, which backends run here and why not, and what is set.",
}
"""What is said of each in `qtool --help`: the first line of its docstring."""
FUNCTIONS = {
    "eval": "evaluate.evaluate",
    "import": "import_model.import_model",
    "methods": "inspect.methods",
    "recipes": "inspect.recipes",
    "run": "run.run_recipe",
}
"""Where a command is that isn't the function of its name in the file of its name."""


def load_command(name: str) -> Any:  # noqa: ANN401
    """Import a command, and return it as typer runs it."""
    from qtool.cli.options import Command

    module, function = FUNCTIONS.get(name, f"{name}.{name}").split(".")
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    found = getattr(importlib.import_module(f"qtool.cli.{module}"), function)
    alone.command(name, cls=Command)(found)
    return typer.main.get_command(alone)


class Commands(typer.core.TyperGroup):
    """Lists the commands by their names, and imports the one that is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        """Return name, command and what is left of the arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and load_command(name), rest


app = typer.Typer(
    name="qtool",
    cls=Commands,
    epilog=FIRST_STEPS,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals are tensors
)
for _name, _line in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)


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
    """Run the command line. Exit codes: docs/cli.md."""
    run(app)
