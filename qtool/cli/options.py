"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str, typer.Argument(help="Directory, hub id, .gguf file, or demo:smollm2.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON; - is stdout.")
]
BackendOption = Annotated[str | None, typer.Option(help="Run quantized layers with this backend.")]
DTypeOption = Annotated[
    str | None,
    typer.Option(help="float16, bfloat16 or float32; default: float16 on a card, else float32."),
]


def torch_dtype(name: str | None) -> Any:  # noqa: ANN401
    """Return torch's dtype of a name; None: the default."""
    import torch  # slow

    if name not in (None, "float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"--dtype is {name!r}; it is float16, bfloat16 or float32.")
    return None if name is None else getattr(torch, name)
