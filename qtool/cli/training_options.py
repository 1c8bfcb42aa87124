"""Options of commands that learn from lines of text."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import checked_seed, in_panel

of_training = in_panel("Training")

ValidationOption = Annotated[
    Path | None, typer.Option(help="Lines to look at; default: 5 % of DATA are held out.")
]
EpochsOption = Annotated[float, of_training(min=0.001, help="Times that each line is seen.")]
BatchOption = Annotated[int, of_training(metavar="N", min=1, help="Lines of a step.")]
WarmupOption = Annotated[float, of_training(min=0, max=1, help="Share of the steps.")]
LineLengthOption = Annotated[
    int, of_training(metavar="N", min=8, help="Tokens of a line; longer ones are cut.")
]
LineOrderOption = Annotated[
    int, of_training(metavar="N", callback=checked_seed, help="Of the order of lines.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")]
