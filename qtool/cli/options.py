"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(help="Directory, hub id, .gguf file, or demo:smollm2.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON; - is stdout.")
]
BackendOption = Annotated[str | None, typer.Option(help="Run quantized layers with this backend.")]
