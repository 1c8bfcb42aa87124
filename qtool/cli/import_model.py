"""`qtool import`."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.checkpoint.place import find_place
from qtool.cli import console, early
from qtool.cli.options import KEPT, JsonOption, check_targets
from qtool.cli.progress import progress
from qtool.cli.tables.next_steps import print_next_of_checkpoint
from qtool.wording import gigabytes


def import_model(
    model: Annotated[
        str, typer.Argument(help="Directory, hub id or file that another program has quantized.")
    ],
    out_dir: Annotated[Path, typer.Argument(help="Directory for the checkpoint.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT_DIR.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped import.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Import a model that another program has quantized, without loss.

    [bold]Examples[/bold]

      qtool import model-gptq OUT_DIR

      qtool import TheBloke/Llama-2-7B-AWQ OUT_DIR
    """
    check_targets([json_file])
    place = find_place(out_dir, overwrite=overwrite, resume=resume)
    with progress(KEPT) as emit, early.opened([model], "cpu", emit, result=place) as (where,):
        from qtool import pipeline

        result = pipeline.import_model(
            where, out_dir, overwrite=overwrite, resume=resume, emit=emit
        )
    values = {
        "out_dir": str(result.out_dir),
        "format": result.format,
        "layers": len(result.layers),
        "average_bits": result.average_bits,
        "weight_bytes": result.weight_bytes,
        "seconds": result.seconds,
    }
    if console.write_json(values, json_file):
        console.out.print(
            f"{result.out_dir}: {len(result.layers)} layers of {result.format}, "
            f"{result.average_bits:.3f} bits per weight, {gigabytes(result.weight_bytes)}.",
            markup=False,
            soft_wrap=True,
        )
        print_next_of_checkpoint(result.out_dir, None)
