"""`qtool export`."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import console
from qtool.cli.options import JsonOption, check_targets, torch_dtype
from qtool.cli.progress import progress
from qtool.wording import gigabytes


def export(
    out_dir: Annotated[Path, typer.Argument(help="Checkpoint that qtool has written.")],
    dest: Annotated[
        Path, typer.Argument(help="What to write; isn't there yet. Of gguf a file that ends so.")
    ],
    target: Annotated[
        str, typer.Option(help="gptq, compressed-tensors, gguf or dense; see docs/exchange.md.")
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[@VERSION]",
            help="Refuse what this engine has no kernels for, such as vllm@0.33.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of what has no codes: float16, bfloat16 or float32; default: the model's own."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write a checkpoint in the format of another program, and compare it bit by bit.

    [bold]Examples[/bold]

      qtool export smollm2-w4 smollm2-gptq --target gptq

      qtool export smollm2-w4 smollm2-ct --target compressed-tensors --engine vllm@0.33

      qtool export smollm2-w4 smollm2-w4.gguf --target gguf

      qtool export smollm2-w3 smollm2-dense --target dense --dtype bfloat16
    """
    torch_dtype(dtype)
    check_targets([json_file])
    with progress("Nothing was written.") as emit:
        from qtool import pipeline

        result = pipeline.export(out_dir, dest, target, engine=engine, dtype=dtype, emit=emit)
    compared = result.compared
    values = {
        "dest": str(result.dest),
        "target": result.target,
        "engine": result.engine,
        "bytes": result.num_bytes,
        "layers": compared.layers,
        "other tensors": compared.tensors,
        "compared by": compared.by,
    }
    if console.write_json(values, json_file):
        console.out.print(
            f"{result.dest}: {result.target}, {gigabytes(result.num_bytes)}. {compared.layers} "
            f"layers and {compared.tensors} other tensors read back to the bit by {compared.by}.",
            markup=False,
            soft_wrap=True,
        )
