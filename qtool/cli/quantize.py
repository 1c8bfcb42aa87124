"""`qtool quantize`."""

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.checkpoint.place import find_place
from qtool.cli import early
from qtool.cli.engine_options import (
    AddressOption,
    EngineOption,
    ThreadsOption,
    WorkersOption,
    engine_options,
)
from qtool.cli.guess import guess_seconds
from qtool.cli.options import (
    GATE_FAILED,
    KEPT,
    DeviceOption,
    DryRun,
    ModelArgument,
    check_targets,
    in_panel,
)
from qtool.cli.progress import Told, progress
from qtool.cli.tables.plans import print_plan
from qtool.cli.tables.preflights import print_preflight
from qtool.cli.tables.quantized import print_quantized
from qtool.cli.tables.sweeps import print_sweep
from qtool.errors import RecipeError

if TYPE_CHECKING:
    from qtool.modeling.locate import Location
    from qtool.recipe.schema import Recipe

DEFAULT_RECIPE = "bcq-w4g128"


class Tune(StrEnum):
    """Choices of --tune, as `recipe.schema.TuningKind`."""

    NONE = "none"
    BLOCKS = "blocks"
    END_TO_END = "end-to-end"
    BOTH = "both"


_what, _how = in_panel("What"), in_panel("How")
_where_to, _debug = in_panel("Where"), in_panel("Debug")


def quantize(
    model: ModelArgument,
    out_dir: Annotated[Path, typer.Argument(help="Directory for the checkpoint.")],
    method: Annotated[str | None, _what(help="rtn, gptq or bcq; see `qtool methods`.")] = None,
    bits: Annotated[int | None, _what(metavar="N", help="Bits per weight, 1 to 8.")] = None,
    group_size: Annotated[str | None, _what(help="Weights that share scales, or 'row'.")] = None,
    average_bits: Annotated[
        float | None,
        _what(
            metavar="BITS",
            help="Choose each layer's bits: stored bits per weight of the blocks' linears, scales "
            "included, on average. --set choosing.counts=strict counts the whole model.",
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        _what(
            metavar="LIST",
            help="Several sizes, such as average_bits=2.5,3,3.5: a directory for each in OUT_DIR, "
            "uniform widths beside them, one table and plot.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, _how(help=f"Built-in recipe or path; default {DEFAULT_RECIPE}.")
    ] = None,
    settings: Annotated[
        list[str] | None, _how("--set", help="Change a key of the recipe: a.b=value.")
    ] = None,
    target: Annotated[
        str | None,
        _how(help="Refuse what `qtool export` couldn't write for this target, such as gptq."),
    ] = None,
    calibration: Annotated[Path | None, _how(help="Calibration directory.")] = None,
    tune: Annotated[
        Tune | None, _how(help="What gradients improve: codes and scales of each block, or scales.")
    ] = None,
    no_calibration: Annotated[bool, _how("--no-calibration", help="Use no data.")] = False,
    strict: Annotated[
        bool, _how("--strict", help="Fail where a solver would do something simpler.")
    ] = False,
    overwrite: Annotated[bool, _where_to("--overwrite", help="Replace OUT_DIR.")] = False,
    resume: Annotated[bool, _where_to("--resume", help="Continue a stopped run.")] = False,
    no_check: Annotated[
        bool,
        _how("--no-check", help="Don't compare the result with the original at the end."),
    ] = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    dry_run: Annotated[
        DryRun | None,
        _debug(
            "--dry-run",
            metavar="[=measure]",
            help="Print bits and bytes, do nothing. With =measure: solve one block, and predict "
            "time, memory and disk of every phase.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, _debug("--json", help="Write the result as JSON; - is stdout.")
    ] = None,
) -> None:
    """Quantize a model and write a checkpoint.

    [bold]Examples[/bold]

      qtool quantize --method bcq --bits 3 demo:smollm2 smollm2-w3

      qtool quantize --recipe rtn-w4g128 --set weights.scheme.symmetric=true MODEL OUT_DIR

      qtool quantize --recipe mine.yaml --dry-run MODEL OUT_DIR

      qtool quantize --average-bits 3.25 MODEL OUT_DIR
    """
    sizes = _sizes(sweep, average_bits, dry_run=dry_run is not None)
    overrides = _overrides(settings or [], calibration, sizes, no_calibration=no_calibration)
    chosen = choose_recipe(recipe, method, bits, group_size, overrides)
    if tune is not None:
        chosen = chosen.model_copy(update={"tuning": chosen.tuning.only(tune.value)})
    check_targets([json_file])
    early.check_places(calibration, target, alone=not sweep and dry_run is not DryRun.MEASURE)
    places: dict[str, Any] = {
        "calib_dir": calibration,
        "overwrite": overwrite,
        "resume": resume,
        "engine": engine_options(engine, workers, threads, address),
    }
    place = find_place(out_dir, overwrite=overwrite, resume=resume)
    kept, passed = "Nothing was written." if dry_run else KEPT, True
    with (
        progress(kept) as emit,
        early.opened([model], device, emit, result=None if dry_run or sweep else place) as (where,),
    ):
        from qtool.steps.request import with_samples

        if recipe is None and not any(text.startswith("calibration=") for text in overrides):
            chosen = with_samples(chosen)  # a recipe file says itself whether it takes data
        if strict:
            chosen = _strict(chosen)
        if calibration is None:
            early.check_texts(chosen.calibration)
        early.check_recipe(where, chosen)
        if not (dry_run or resume):
            _first_guess(emit, where, chosen, device)
        from qtool import pipeline

        if dry_run is DryRun.MEASURE:
            predicted = pipeline.preflight(
                where, out_dir, chosen, calib_dir=calibration, check=not no_check, emit=emit
            )
            show = partial(print_preflight, predicted)
        elif dry_run:
            found = pipeline.explain(where, chosen, calib_dir=calibration, emit=emit)
            plan = pipeline.plan(where, chosen, target=target) if found is None else found.plan
            show = partial(print_plan, plan, found)
        elif sweep is not None:
            swept = pipeline.sweep(where, out_dir, chosen, sizes, emit=emit, **places)
            show = partial(print_sweep, swept)
        else:
            result = pipeline.quantize(
                where, out_dir, chosen, check=not no_check, target=target, emit=emit, **places
            )
            show = partial(print_quantized, result, model)
            passed = all(line.passed for line in result.budgets)
    show(json_file)
    if not passed:
        raise typer.Exit(GATE_FAILED)


def _strict(recipe: "Recipe") -> "Recipe":
    """Return the recipe with solvers that do nothing simpler than asked."""
    if recipe.calibration is None:
        return recipe
    section = recipe.calibration.model_copy(update={"strict": True})
    return recipe.model_copy(update={"calibration": section})


def _overrides(
    settings: list[str],
    calibration: Path | None,
    sizes: list[float],
    *,
    no_calibration: bool,
) -> list[str]:
    """Return all assignments to the recipe; what a user sets comes last."""
    first = [f"choosing.average_bits={sizes[0]}"] if sizes else []
    if no_calibration:
        _check_no_calibration(settings, calibration)
        first.append("calibration=null")
    elif calibration is not None:
        first.append("calibration={}")
    return [*first, *settings]


def _first_guess(emit: Told, model: "Location", recipe: "Recipe", device: str | None) -> None:
    """Guess how long a calibrated run takes; what choosing takes isn't known."""
    if recipe.calibration is not None and recipe.choosing is None:
        seconds = guess_seconds(model, recipe.calibration, device)
        if seconds is not None:
            emit.guess(seconds)


def _sizes(sweep: str | None, average_bits: float | None, *, dry_run: bool) -> list[float]:
    """Return the averages that are asked for; none where nothing is to be chosen."""
    if sweep is None:
        return [] if average_bits is None else [average_bits]
    if average_bits is not None or dry_run:
        other = "--dry-run" if dry_run else "--average-bits"
        raise RecipeError(f"--sweep and {other} exclude each other. Give one.")
    key, _, values = sweep.partition("=")
    try:
        sizes = [float(value) for value in values.split(",")]
    except ValueError:
        sizes = []
    if key != "average_bits" or not sizes or len(set(sizes)) < len(sizes):
        raise RecipeError(
            f"--sweep is {sweep!r}; it takes average_bits=A,B,..., each a number and once, such as "
            "average_bits=2.5,3,3.5."
        )
    return sizes


def _check_no_calibration(settings: list[str], directory: Path | None) -> None:
    """Refuse what asks for data and for none at once."""
    if directory is not None:
        raise RecipeError("--no-calibration and --calibration exclude each other. Give one.")
    if any(text.startswith("calibration.") for text in settings):
        raise RecipeError("--no-calibration leaves nothing for --set calibration.KEY to change.")


def choose_recipe(
    recipe: str | None,
    method: str | None,
    bits: int | None,
    group_size: str | None,
    settings: list[str],
) -> "Recipe":
    """Return the recipe with the options laid over it, torch-free.

    Raises:
        RecipeError: an option or setting is impossible.
    """
    from qtool.recipe.load import load_recipe, recipe_from_mapping  # pydantic: a quarter second

    overrides = list(settings)
    if bits is not None:
        overrides.append(f"weights.scheme.num_bits={bits}")
    if group_size is not None:
        overrides.append(f"weights.scheme.group_size={_group_size(group_size)}")
    if method is None:
        return load_recipe(recipe or DEFAULT_RECIPE, overrides)
    if recipe is not None:
        return load_recipe(recipe, [f"weights.method={json.dumps(method)}", *overrides])
    return recipe_from_mapping({"weights": {"method": method}}, overrides)


def _group_size(text: str) -> str:
    if text == "row":
        return "null"
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(
            f"--group-size is {text!r}; allowed are 1 and more, or 'row' for one group per row."
        )
    return text
