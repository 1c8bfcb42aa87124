"""`qtool report`."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.base import Progress
from qtool.cli import console
from qtool.cli.progress import progress


def report(
    out_dirs: Annotated[
        list[Path],
        typer.Argument(help="Results of runs; several are compared. A sweep stands for its sizes."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes; default: report.html in OUT_DIR.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of `qtool eval` or `qtool bench` that lies elsewhere."),
    ] = None,
) -> None:
    """Show what runs have found out as one HTML page, which needs no network.

    [bold]Examples[/bold]

      qtool report OUT_DIR

      qtool report W3 W4 W8 --output sizes.html
    """
    if measured and len(out_dirs) > 1:
        raise typer.BadParameter(
            "--measured is of one directory. Put the JSON of each into its OUT_DIR."
        )
    with progress() as emit:
        emit(Progress("reading results"))
        from qtool import pipeline  # torch: slow

        written = pipeline.report(out_dirs, output, measured or ())
    console.print_lines(
        [f"{written}: {written.stat().st_size / 1e3:,.0f} kB. Open it in a browser."]
    )
