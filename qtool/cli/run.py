"""`qtool run`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.checkpoint.place import find_place
from qtool.cli import console, early
from qtool.cli.engine_options import (
    AddressOption,
    ClusterOptions,
    EngineOption,
    NetworkOption,
    NodeMemoryOption,
    NodesOption,
    ThreadsOption,
    WorkersOption,
    engine_options,
)
from qtool.cli.options import (
    GATE_FAILED,
    DeviceOption,
    JsonOption,
    RecipeDryRun,
    check_targets,
)
from qtool.cli.progress import progress
from qtool.cli.tables.forecasts import print_forecast
from qtool.cli.tables.preflights import print_preflight
from qtool.cli.tables.verdicts import print_gates, print_steps
from qtool.errors import QtoolError, RecipeError

if TYPE_CHECKING:
    from qtool.pipeline import RunResult
    from qtool.recipe.schema import Recipe

STEPS_KEPT = "What is finished is kept: the same command goes on after it."


def run_recipe(
    recipe: Annotated[str, typer.Argument(help="Built-in recipe such as ci/smoke, or path.")],
    model: Annotated[
        str | None,
        typer.Argument(help="As for `qtool quantize`; default: what the recipe names."),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Argument(
            help="Directory for the checkpoint and all results; default: the recipe's name."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of the recipe: a.b=value.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Calibration directory.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local task data: nothing is downloaded.")
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Run programs that the model writes, in a sandbox."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT_DIR, and begin anew.")
    ] = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    nodes: NodesOption = None,
    node_memory: NodeMemoryOption = None,
    network: NetworkOption = None,
    dry_run: Annotated[
        RecipeDryRun | None,
        typer.Option(
            "--dry-run",
            metavar="[=KIND]",
            help="Check all, print steps and gates, do nothing. With =measure: predict what "
            "quantizing takes, as `qtool quantize` does; with =cluster: on many machines.",
        ),
    ] = None,
    json_file: JsonOption = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gates as JUnit XML.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a summary as Markdown; - is stdout.")
    ] = None,
) -> None:
    """Carry out a recipe: quantize, measure, and exit with 3 if a gate fails.

    [bold]Examples[/bold]

      qtool run ci/smoke

      qtool run mine.yaml MODEL OUT_DIR --junit gates.xml --markdown summary.md

      qtool run mine.yaml MODEL OUT_DIR --set gates.kl_mean=0.1 --dry-run

      qtool run mine.yaml MODEL --dry-run=cluster --nodes 4 --node-memory 64
    """
    chosen, name, target = _request(recipe, model, out_dir, settings or [], calibration)
    check_targets([json_file, junit, markdown])
    asked, on_paper = ClusterOptions(nodes, node_memory, network), dry_run is RecipeDryRun.CLUSTER
    asked.check(is_asked=on_paper)
    shared = None if on_paper else engine_options(engine, workers, threads, address)
    early.check_directory(calibration)
    if chosen.eval is not None and chosen.eval.tasks:
        early.check_spelling(chosen.eval.tasks)
    kept = "Nothing was written." if dry_run else STEPS_KEPT
    place = None if dry_run else find_place(target, overwrite=overwrite, resume=not overwrite)
    with progress(kept) as emit, early.opened([name], device, emit, result=place) as (where,):
        if calibration is None:
            early.check_texts(chosen.calibration)
        early.check_recipe(where, chosen)
        from qtool import pipeline

        options = pipeline.RunOptions(
            calib_dir=calibration,
            data_dir=data_dir,
            confirm_unsafe=confirm_run_unsafe_code,
            overwrite=overwrite,
            engine=shared,
        )
        if dry_run is not None:
            pipeline.check_measurable(chosen, options)
        if dry_run is RecipeDryRun.CLUSTER:
            there = asked.cluster(workers, threads or 1)
            found = pipeline.foresee(
                where, chosen, there, threads=threads or 1, calib_dir=calibration, emit=emit
            )
            show = partial(print_forecast, found)
        elif dry_run is RecipeDryRun.MEASURE:
            show = partial(
                print_preflight,
                pipeline.preflight(
                    where,
                    target,
                    chosen,
                    calib_dir=calibration,
                    check=chosen.check is not None,
                    emit=emit,
                ),
            )
        elif dry_run is RecipeDryRun.PLAN:
            show = partial(print_steps, chosen, pipeline.plan(where, chosen))
        else:
            title = Path(recipe).name
            result = pipeline.run_recipe(where, target, chosen, options, title=title, emit=emit)
            show = partial(_show_result, result, junit, markdown)
    show(json_file)


def _show_result(
    result: "RunResult", junit: Path | None, markdown: Path | None, json_file: Path | None
) -> None:
    """Print and write the verdict.

    Raises:
        typer.Exit: a gate has failed.
        QtoolError: no gate has, but a task gave no scores.
    """
    if junit is not None:
        console.write_text(result.junit(), junit)
    is_free = console.write_json(result.report(), json_file)
    if markdown is not None:
        console.write_text(result.markdown(), markdown)
    if is_free and str(markdown) != "-":
        print_gates(result)
    if not result.passed:
        raise typer.Exit(GATE_FAILED)
    if result.failures:
        raise QtoolError(
            f"All gates passed, but tasks failed: {'; '.join(result.failures)} The same command "
            "again runs only these."
        )


def _request(
    source: str,
    model: str | None,
    out_dir: Path | None,
    settings: list[str],
    calibration: Path | None,
) -> tuple["Recipe", str, Path]:
    """Return recipe, model and OUT_DIR.

    Raises:
        RecipeError: the recipe is wrong, or nobody names a model.
    """
    from qtool.recipe.load import load_recipe  # pydantic: a quarter second

    first = ["calibration={}"] if calibration is not None else []
    chosen = load_recipe(source, [*first, *settings])
    named = model or chosen.model
    if named is None:
        raise RecipeError(
            f"{source} names no model, so give one: qtool run {source} MODEL OUT_DIR."
        )
    return chosen, named, out_dir or Path(Path(source).stem)
