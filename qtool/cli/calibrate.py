"""`qtool calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.errors import NotYetError


def calibrate(
    model: Annotated[str, typer.Argument(help="Directory, hub id, .gguf file, or demo:smollm2.")],
    calib_dir: Annotated[Path, typer.Argument(help="Directory for the calibration data.")],
    tasks: Annotated[
        str | None, typer.Option(help="Match the prompt lengths of these tasks.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Built-in recipe or path.")] = None,
) -> None:
    """Draw calibration samples whose lengths match the target tasks (next version)."""
    del model, calib_dir, tasks, recipe
    raise NotYetError(
        "`qtool calibrate` comes with the next version; `qtool quantize` needs no calibration yet."
    )
