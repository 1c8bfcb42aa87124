"""`qtool calibrate`."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import console, early
from qtool.cli.options import DeviceOption, JsonOption, ModelArgument, check_targets
from qtool.cli.progress import progress
from qtool.cli.tables.next_steps import print_next
from qtool.errors import MissingExtraError, RecipeError

if TYPE_CHECKING:
    from qtool.pipeline import CalibrateResult

BAR = 24


def calibrate(
    model: ModelArgument,
    calib_dir: Annotated[Path, typer.Argument(help="Directory for the calibration data.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Match the prompt lengths of these tasks, comma-separated."),
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="Match these lengths: a file with one number per line.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Draw from this and no mixture: bundled text, .txt or .jsonl[.gz] file, or "
            "hub:NAME:CONFIG:SPLIT."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Take the section 'calibration' of this recipe.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: calibration.num_samples=32.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a calibration in CALIB_DIR.")
    ] = False,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Draw calibration samples, with the prompt lengths of the target tasks if asked.

    [bold]Examples[/bold]

      qtool calibrate --tasks mmlu,humaneval MODEL CALIB_DIR

      qtool calibrate --dataset mine.jsonl MODEL CALIB_DIR

      qtool calibrate --dataset hub:allenai/c4:en:train MODEL CALIB_DIR
    """
    from qtool.data.lengths import read_lengths  # torch-free, but not at --help
    from qtool.recipe.load import load_recipe, recipe_from_mapping

    if tasks is not None and lengths is not None:
        raise RecipeError("--tasks and --lengths both say what to match. Give one of them.")
    overrides = list(settings or [])
    if dataset is not None:
        overrides.insert(0, "calibration.mixture=null")
        overrides.append(f"calibration.dataset={json.dumps(dataset)}")
    if tasks is not None or lengths is not None:
        overrides.append("calibration.sequence_length=match")
    if tasks is not None:
        overrides.append(f"calibration.tasks=[{tasks}]")
    if recipe is not None:
        chosen = load_recipe(recipe, overrides)
    else:
        base = {"calibration": {}, "weights": {"method": "bcq"}}
        chosen = recipe_from_mapping(base, overrides)
    if chosen.calibration is None:
        raise RecipeError(f"Recipe {recipe} has no section 'calibration': it uses no data.")
    given = tuple(read_lengths(lengths)) if lengths is not None else None
    check_targets([json_file])
    with progress("Nothing was written.") as emit, early.opened([model], device, emit) as (where,):
        early.check_texts(chosen.calibration)
        from qtool import pipeline

        result = pipeline.calibrate(
            where,
            calib_dir,
            chosen.calibration,
            lengths=given,
            seed=chosen.seed,
            overwrite=overwrite,
            emit=emit,
        )
    _plot(result)
    if console.write_json(asdict(result), json_file):
        _print_result(result, model)


def _plot(result: "CalibrateResult") -> None:
    """Draw both histograms, or say in one line what that needs."""
    from qtool.data.calibration_files import LENGTHS_NAME
    from qtool.report.lengths import draw_lengths

    path = result.calib_dir / LENGTHS_NAME
    try:
        draw_lengths(path, result.lengths, result.wanted_lengths)
    except MissingExtraError as error:
        path.unlink(missing_ok=True)  # of an earlier run: it would show other samples
        console.err.print(f"No plot: {error}", markup=False, soft_wrap=True)


def _print_result(result: "CalibrateResult", model: str) -> None:
    from qtool.data.lengths import bin_edges, histogram
    from qtool.report.lengths import describe_lengths

    edges = bin_edges([*result.lengths, *result.wanted_lengths])
    shares = [histogram(result.lengths, edges)]
    columns = [">length in tokens", "samples"]
    if result.wanted_lengths:
        columns.append("requested")
        shares.append(histogram(result.wanted_lengths, edges))
    bins = (f"{low}-{high - 1}" for low, high in itertools.pairwise(edges))
    rows = zip(bins, *(map(_bar, each) for each in shares), strict=True)
    console.print_table(str(result.calib_dir), columns, rows)
    console.out.print(f"Lengths of samples: {describe_lengths(result.lengths)}.")
    if result.wanted_lengths:
        console.out.print(f"Lengths requested: {describe_lengths(result.wanted_lengths)}.")
    tokens = ", ".join(f"{name} {count}" for name, count in result.special_tokens.items())
    console.out.print(f"Special tokens: {tokens or 'none'}.", markup=False)
    console.print_lines(
        [
            f"{result.samples} of {result.samples_wanted} samples, {result.tokens} tokens, digest "
            f"{result.digest}."
        ]
    )
    print_next(("quantize", "--calibration", result.calib_dir, model, "OUT_DIR"))


def _bar(share: float) -> str:
    return f"{share:4.0%} {'#' * round(share * BAR)}"
