"""Many sizes of one model: each quantized into a directory of its own, and all of them compared.

Calibration samples are drawn once, and prices of choices measured once: they are the same for all
sizes (`choosing.choose` keeps them). What a layer is solved for depends on the layers before it, so
each size is solved by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qtool.base import Emit, Notice, Progress, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.many_results import check_collection, check_table, held
from qtool.checkpoint.place import find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.sizes import AS_THEY_WERE, QUANTIZED, sizes_of
from qtool.choosing.choose import check_choices
from qtool.data.corpora import Corpus
from qtool.engines import EngineOptions
from qtool.errors import MissingExtraError, QtoolError, RecipeError
from qtool.evaluation.closeness import References, compare_closely
from qtool.evaluation.perplexity import perplexity
from qtool.modeling.device import default_device, free_memory
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source
from qtool.pipeline.check import checked_text, record_original
from qtool.pipeline.quantize import open_samples, quantize
from qtool.recipe.choosing import scheme_changes
from qtool.recipe.schema import Recipe
from qtool.report.sizes import MeasuredSize, draw_sizes, with_front
from qtool.steps.memory import failures_of_the_machine
from qtool.steps.plan import make_plan
from qtool.storage.plain_json import write_json_file

TABLE_NAME, PLOT_NAME = "sweep.json", "sweep.png"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What became of each size."""

    out_dir: Path
    sizes: tuple[MeasuredSize, ...]
    """Those that are finished and measured, the smallest first."""
    failures: Mapping[str, str]
    """By the name of the directory, what went wrong."""


def sweep(  # noqa: PLR0913 - as quantize, with sizes
    model: Location,
    out_dir: Path,
    recipe: Recipe,
    averages: Sequence[float],
    *,
    calib_dir: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    engine: EngineOptions | None = None,
    emit: Emit = ignore_events,
) -> SweepResult:
    """Quantize a model to several sizes, and to each choice alone, and compare them.

    What fails at one size is told, and the others go on. Results are `out_dir`/average_bits=...,
    `out_dir`/uniform=..., and in `out_dir` a table and a plot.

    Args:
        model: Where the original is, or comes from.
        out_dir: Gets a directory for each size.
        recipe: With a section `choosing`.
        averages: In place of its `average_bits`.
        calib_dir: As all that follows, see `quantize`.
        overwrite: For each size.
        resume: For each size; those that are finished are only measured.
        engine: Workers that share the work of each size.
        emit: Is told of all.

    Raises:
        RecipeError: a size is impossible: found before the first is begun.
        OutputError: something is in the way of one of them.
    """
    recipes = dict(_recipes(recipe, averages))
    _look(out_dir, recipes, overwrite=overwrite, resume=resume)
    emit(Progress("opening the model"))
    source = open_source(model)
    for each in recipes.values():
        check_choices(source, each, make_plan(source, each))
    check_apart(out_dir, source.directory)
    with held(out_dir):
        samples = open_samples(source, recipe, calib_dir, emit)
        failures: dict[str, str] = {}
        for number, (name, each) in enumerate(recipes.items(), start=1):
            emit(Progress(f"{name}, {number} of {len(recipes)}"))
            with _going_on(name, failures, emit):
                quantize(
                    model,
                    out_dir / name,
                    each,
                    calib_dir=calib_dir,
                    samples=samples,
                    overwrite=overwrite,
                    resume=resume,
                    engine=engine,
                    emit=emit,
                )
        finished = [name for name in recipes if name not in failures]
        sizes = _measured(source, out_dir, finished, failures, emit)
        return _written(SweepResult(out_dir, sizes, failures), emit)


def _recipes(recipe: Recipe, averages: Sequence[float]) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipe of each size by the name of its directory, then those of uniform widths."""
    section = recipe.choosing
    if section is None:
        raise RecipeError("A sweep needs a section 'choosing' in the recipe.")
    for average in averages:
        chosen = section.model_validate({**section.model_dump(), "average_bits": average})
        yield f"average_bits={average:g}", recipe.model_copy(update={"choosing": chosen})
    for choice in section.choices:
        changes = scheme_changes(choice)
        if changes is None:
            continue
        scheme = recipe.weights.scheme.model_copy(update=dict(changes))
        weights = recipe.weights.model_copy(update={"scheme": scheme})
        what = ",".join(f"{key}={value}" for key, value in changes.items())
        name = f"uniform={choice if isinstance(choice, int) else what}"
        yield name, recipe.model_copy(update={"choosing": None, "weights": weights})


def _look(out_dir: Path, names: Mapping[str, Recipe], *, overwrite: bool, resume: bool) -> None:
    """Check that all sizes can be written."""
    check_collection(out_dir, "a sweep")
    check_table(out_dir / TABLE_NAME, ("sizes", "failures"), drawn=(PLOT_NAME,))
    for name in names:
        look(find_place(out_dir / name, overwrite=overwrite, resume=resume))


@contextmanager
def _going_on(name: str, failures: dict[str, str], emit: Emit) -> Iterator[None]:
    """Note and tell what fails at one size; the others go on."""
    try:
        yield
    except QtoolError as error:
        failures[name] = str(error)
        emit(Notice(f"{name}: {error}"))
    free_memory()


def _measured(
    source: ModelSource,
    out_dir: Path,
    names: Sequence[str],
    failures: dict[str, str],
    emit: Emit,
) -> tuple[MeasuredSize, ...]:
    """Compare finished sizes with the original; adds what fails."""
    if not names:
        return ()
    device = default_device()
    emit(Progress("measuring"))
    try:
        references = record_original(source, device, emit)
    except QtoolError as error:
        emit(Notice(f"All is complete, but nothing was compared with the original: {error}"))
        return ()
    text, found = checked_text(source, device), []
    for name in names:
        with _going_on(name, failures, emit), failures_of_the_machine(str(device), out_dir):
            found.append(_measure_size(out_dir / name, references, text, emit))
    return with_front(found)


def _measure_size(
    directory: Path, references: References, text: Corpus, emit: Emit
) -> MeasuredSize:
    disk = sizes_of(CheckpointReader(directory))
    blocks = [each for each in disk.kinds if each.kind in (QUANTIZED, AS_THEY_WERE)]
    loaded = load_model(Location(directory))
    close = compare_closely(loaded, references, emit)
    windows, length = references.text.windows.shape
    quality = perplexity(loaded, text, context_length=length, max_windows=windows, emit=emit)
    assert close.text is not None
    return MeasuredSize(
        name=directory.name,
        uniform=directory.name.startswith("uniform"),
        block_bits=8 * sum(each.num_bytes for each in blocks) / sum(b.num_weights for b in blocks),
        strict_bits=disk.strict_bits,
        disk_bytes=disk.num_bytes,
        kl_text=close.text.kl_divergence,
        kl_chats=None if close.chats is None else close.chats.kl_divergence,
        perplexity=quality.perplexity,
    )


def _written(result: SweepResult, emit: Emit) -> SweepResult:
    """Write the table, and the plot if that can be drawn; return the same."""
    values = {"sizes": [asdict(size) for size in result.sizes], "failures": dict(result.failures)}
    write_json_file(result.out_dir / TABLE_NAME, values)
    if result.sizes:
        try:
            draw_sizes(result.out_dir / PLOT_NAME, result.sizes)
        except MissingExtraError as error:
            emit(Notice(str(error)))
    return result
