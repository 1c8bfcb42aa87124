"""`qtool calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import console
from qtool.cli.options import JsonOption, ModelArgument
from qtool.errors import RecipeError

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
    recipe: Annotated[
        str | None, typer.Option(help="Take the section 'calibration' of this recipe.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: calibration.num_samples=32.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Draw calibration samples, with the prompt lengths of the target tasks if asked.

    [bold]Examples[/bold]

      qtool calibrate --tasks mmlu,humaneval MODEL CALIB_DIR

      qtool calibrate --set calibration.dataset=mine.txt MODEL CALIB_DIR
    """
    from qtool.data.lengths import read_lengths  # torch-free, but not at --help
    from qtool.recipe.load import load_recipe, recipe_from_mapping

    overrides = list(settings or [])
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
    from qtool import pipeline  # torch: slow

    with console.progress() as emit:
        result = pipeline.calibrate(
            model, calib_dir, chosen.calibration, lengths=given, seed=chosen.seed, emit=emit
        )
    console.write_json(asdict(result), json_file)
    if console.wants_table(json_file):
        _print_result(result)


def _print_result(result: "CalibrateResult") -> None:
    from qtool.data.lengths import bin_edges, histogram

    edges = bin_edges([*result.lengths, *result.wanted_lengths])
    drawn = histogram(result.lengths, edges)
    columns = {"length in tokens": "right", "samples": "left"}
    rows: list[tuple[str, ...]] = [
        (f"{low}-{high - 1}", _bar(share)) for low, high, share in _bins(edges, drawn)
    ]
    if result.wanted_lengths:
        columns["tasks"] = "left"
        wanted = histogram(result.wanted_lengths, edges)
        rows = [(*row, _bar(share)) for row, share in zip(rows, wanted, strict=True)]
    console.print_table(str(result.calib_dir), columns, rows)
    console.out.print(
        f"{result.samples} samples, {result.tokens} tokens, digest {result.digest}. "
        f"Use them with: qtool quantize --calibration {result.calib_dir} ..."
    )


def _bins(edges: list[int], shares: list[float]) -> list[tuple[int, int, float]]:
    return list(zip(edges[:-1], edges[1:], shares, strict=True))


def _bar(share: float) -> str:
    return f"{share:4.0%} {'#' * round(share * BAR)}"
