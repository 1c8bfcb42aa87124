"""What is cheap to find wrong is found first: before a model is read, most of it before torch."""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import plugins
from qtool.base import Emit, Progress
from qtool.errors import DataError, RecipeError, require
from qtool.storage.jsonl import check_file

if TYPE_CHECKING:
    from qtool.checkpoint.place import Place
    from qtool.modeling.locate import Location
    from qtool.recipe.calibration import CalibrationSection
from qtool.recipe.schema import Recipe

SAMPLES, ADAPTER_MANIFEST = "samples.safetensors", "adapter.json"
TASK_NAMES = re.compile(
    rb"^[ \t]*(?:- )?[\"']?(?:task|group|tag)[\"']?[ \t]*:[ \t]*[\"']?([\w.+:-]+)", re.MULTILINE
)
TASK_DATASET = re.compile(
    rb"^[\"']?dataset_(path|name)[\"']?[ \t]*:[ \t]*[\"']?([\w./-]+)", re.MULTILINE
)
"""In lm-eval's own files: its index takes ten seconds."""


@contextlib.contextmanager
def opened(
    models: Sequence[str | None],
    device: str | None,
    emit: Emit,
    adapter: Path | None = None,
    *,
    result: "Place | None" = None,
) -> Iterator[list[Any]]:
    """Say what is looked up, look at each config.json, fetch the demo model, choose the device.

    Gives a `Location` for each name, None for None: the only place where a string means a model.
    An adapter goes on the first. A result may be written at its place, or this is refused first.

    Raises:
        OutputError: it may not.
        ModelError: a model isn't there or says nothing of itself, or can't be fetched.
        CheckpointError: its config.json isn't JSON.
        BackendError: torch doesn't have the device.
        DataError: the adapter isn't there.
        CheckpointError: it is damaged, or of another base.
    """
    check_adapter(adapter)
    from qtool.modeling.config import read_config
    from qtool.modeling.demo import demo_file
    from qtool.modeling.locate import locate

    named = [model for model in models if model]
    emit(Progress(f"looking up {' and '.join(named)}" if named else "loading torch"))
    for model in named:
        if model.startswith("demo:"):
            demo_file(model, emit)
    found = [replace(locate(model), emit=emit) if model else None for model in models]
    if adapter is not None and found[0] is not None:
        found[0] = replace(found[0], adapter=adapter)
    if result is not None:
        _check_place(result, found)
    for location in filter(None, found):
        if (directory := location.config_directory()) is not None:
            read_config(directory)
    from qtool.modeling.device import use_device  # torch: slow

    with use_device(device):
        if adapter is not None and found[0] is not None:
            from qtool.modeling.adapters import check_belonging

            check_belonging(found[0])
        yield found


def _check_place(result: "Place", models: Sequence["Location | None"]) -> None:
    from qtool.checkpoint.apart import check_apart
    from qtool.checkpoint.claim import look

    for path in (one.path for one in models if one is not None and one.path is not None):
        check_apart(result.out_dir, path)  # before anything is said of --overwrite
    look(result)


def check_adapter(adapter: Path | None) -> None:
    """Refuse an adapter that isn't there, before a model is opened.

    Raises:
        DataError: the directory has no manifest of one.
    """
    if adapter is not None:
        try:
            check_file(adapter / ADAPTER_MANIFEST)
        except DataError as error:
            raise DataError(
                f"{adapter} is no adapter: {error} `qtool adapt OUT_DIR DATA {adapter}` makes one."
            ) from error


def check_recipe(model: "Location", recipe: "Recipe") -> None:
    """Refuse what a local model's files show to be impossible, before transformers is imported.

    Of a GGUF file or a hub's model what the recipe alone shows: before it is converted or fetched.

    Raises:
        QtoolError: as `make_plan`, which finds the rest.
    """
    from qtool.modeling.glance import glance
    from qtool.steps.request import check_recipe_alone, check_request

    seen = None if model.path is None or not model.path.is_dir() else glance(model.path)
    if seen is None:
        check_recipe_alone(recipe)
    else:
        check_request(recipe, *seen)


def check_backend(name: str | None) -> None:
    """Refuse a backend that doesn't exist.

    Raises:
        UnknownNameError: there is none of that name.
    """
    import qtool.runtime.backends  # torch-free, as long as none is loaded

    if name is not None:
        plugins.check_name(name, plugins.names(qtool.runtime.backends), "backends")


def check_places(calib_dir: Path | None, target: str | None, *, alone: bool) -> None:
    """Refuse a calibration directory that isn't there, and as `check_export_target`."""
    check_directory(calib_dir)
    check_export_target(target, alone=alone)


def check_export_target(target: str | None, *, alone: bool) -> None:
    """Refuse a target of `export` that doesn't exist, or that nobody would look at.

    Raises:
        UnknownNameError: there is none of that name.
        RecipeError: several results or a prediction are asked for.
    """
    if target is None:
        return
    from qtool.exchange import exchange_names  # torch: slow

    plugins.check_name(target, exchange_names(), "exchange")
    if not alone:
        raise RecipeError("--target goes with one result, and with --dry-run. Leave it out.")


def check_directory(calib_dir: Path | None) -> None:
    """Refuse a calibration directory that isn't there.

    Raises:
        DataError: it isn't one.
    """
    if calib_dir is None:
        return
    try:
        check_file(calib_dir / SAMPLES)
    except DataError as error:
        raise DataError(
            f"{calib_dir} is no calibration directory: {error} "
            f"`qtool calibrate MODEL {calib_dir}` makes one."
        ) from error


def check_texts(section: "CalibrationSection | None") -> None:
    """Refuse texts that aren't there, before the model is opened.

    Raises:
        DataError: a text or the prompts of a task are missing.
    """
    if section is None:
        return
    from qtool.data.corpora import WRITTEN_BY_THE_MODEL
    from qtool.data.documents import HUB_PREFIX
    from qtool.data.lengths import check_known

    if section.sequence_length == "match":
        check_known(section.tasks)
    for name in (source.dataset for source in section.sources):
        if name.startswith(HUB_PREFIX):
            require(name, "data", "datasets")
        elif name != WRITTEN_BY_THE_MODEL:
            check_text(name)


def check_text(name: str) -> None:
    """Refuse a text that isn't there; what stands in it is read later.

    Raises:
        DataError: there is no bundled text and no file of that name.
    """
    from qtool.data.corpora import bundled, open_dataset
    from qtool.data.documents import HUB_PREFIX, JSONL_SUFFIXES

    if name in bundled():
        return
    if name.endswith((".txt", *JSONL_SUFFIXES)) and not name.startswith(HUB_PREFIX):
        check_file(Path(name))
    else:
        open_dataset(name)  # raises, and says why


def check_pairs(file: Path | None) -> None:
    """Refuse prompts that aren't there, or whose answers couldn't be scored; None: there are none.

    Raises:
        DataError: there is no such file, or a line of it isn't one, or it has no prompts.
        MissingExtraError: sacrebleu or rouge-score isn't installed.
    """
    if file is not None:
        check_file(file)
        require("BLEU and ROUGE", "eval", "sacrebleu", "rouge_score")
        from qtool.data.exercises import check_exercises  # torch: slow

        check_exercises(file, prompts=True)


def check_spelling(names: Sequence[str]) -> None:
    """Refuse names that stand nowhere in lm-eval's files, before anything slow is imported.

    Of a name that does stand there lm-eval's index says later whether it is a task.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: there is no task, group or tag of that name.
    """
    from qtool.evaluation.lm_eval.hooks import describe_unknown, require_lm_eval

    require_lm_eval()
    text = b"\n".join(_task_files().values())
    for name in names:
        alone = rb"(?<![\w.+-])" + re.escape(name.encode()) + rb"(?![\w.+-])"
        if text and not re.search(alone, text):
            known = map(bytes.decode, set(TASK_NAMES.findall(text)))
            raise DataError(describe_unknown(name, known))


def check_data(names: Sequence[str], data_dir: Path) -> None:
    """Refuse a folder that has no file at all of a task's data set, where that is known by name.

    Which splits a task reads lm-eval's index says later.

    Raises:
        DataError: there is no such folder, or none of the files is there.
    """
    from qtool.data.local_datasets import DataFolder, LocalSplits

    folder = DataFolder(data_dir)
    for name in names:
        dataset, config = _dataset(name)
        if dataset is not None and not folder.mentions(dataset, name, config or name):
            splits = LocalSplits(folder, name, {"dataset_path": dataset, "dataset_name": config})
            splits.file_of("test")  # raises, and says what to put where


def _dataset(name: str) -> tuple[str | None, str | None]:
    """Return path and name of the data set that the file of a task or group names, or its folder.

    Neither, where that isn't a single one.
    """
    defines = re.compile(
        rb"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?%s[\"']?[ \t]*$" % re.escape(name.encode()),
        re.MULTILINE,
    )
    file = next((file for file, text in _task_files().items() if defines.search(text)), None)
    if file is None:
        return None, None
    own = dict(TASK_DATASET.findall(_task_files()[file]))
    beside = b"\n".join(path.read_bytes() for path in file.parent.glob("*yaml*"))
    paths = (
        {own[b"path"]}
        if b"path" in own
        else {v for k, v in TASK_DATASET.findall(beside) if k == b"path"}
    )
    named = own.get(b"name")
    return (paths.pop().decode() if len(paths) == 1 else None), named and named.decode()


@functools.cache
def _task_files() -> dict[Path, bytes]:
    """Return what lm-eval's files of tasks say; empty if lm-eval isn't installed."""
    spec = importlib.util.find_spec("lm_eval")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    files = (path for folder in folders for path in Path(folder, "tasks").rglob("*.y*ml"))
    return {path: path.read_bytes() for path in files}
