"""What is cheap to find wrong is found first: before a model is read, most of it before torch."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import plugins
from qtool.base import Emit, Progress
from qtool.errors import DataError
from qtool.storage.jsonl import check_file

if TYPE_CHECKING:
    from qtool.modeling.locate import Location
    from qtool.recipe.schema import CalibrationSection, Recipe

SAMPLES = "samples.safetensors"


@contextlib.contextmanager
def opened(models: Sequence[str | None], device: str | None, emit: Emit) -> Iterator[list[Any]]:
    """Say what is opened, look at each config.json, fetch the demo model, choose the device.

    Gives a `Location` for each name, None for None: the only place where a string means a model.

    Raises:
        ModelError: a model isn't there or says nothing of itself, or can't be fetched.
        CheckpointError: its config.json isn't JSON.
        BackendError: torch doesn't have the device.
    """
    from qtool.modeling.config import read_config
    from qtool.modeling.demo import demo_file
    from qtool.modeling.locate import locate

    named = [model for model in models if model]
    emit(Progress(f"opening {' and '.join(named)}" if named else "loading torch"))
    for model in named:
        if model.startswith("demo:"):
            demo_file(model, emit)
    found = [locate(model) if model else None for model in models]
    for location in filter(None, found):
        if (directory := location.config_directory()) is not None:
            read_config(directory)
    from qtool.modeling.device import use_device  # torch: slow

    with use_device(device):
        yield found


def check_recipe(model: "Location", recipe: "Recipe") -> None:
    """Refuse what a local model's files show to be impossible, before transformers is imported.

    Raises:
        QtoolError: as `make_plan`, which finds the rest.
    """
    from qtool.modeling.glance import glance
    from qtool.stages.plan import check_request

    if model.path is None or not model.path.is_dir():
        return
    seen = glance(model.path)
    if seen is not None:
        check_request(recipe, *seen)


def check_backend(name: str | None) -> None:
    """Refuse a backend that doesn't exist.

    Raises:
        UnknownNameError: there is none of that name.
    """
    import qtool.runtime.backends  # torch-free, as long as none is loaded

    if name is not None:
        plugins.check_name(name, plugins.names(qtool.runtime.backends), "backends")


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
    from qtool.data.corpora import bundled, open_dataset
    from qtool.data.documents import HUB_PREFIX, JSONL_SUFFIXES
    from qtool.data.lengths import check_known

    if section.sequence_length == "match":
        check_known(section.tasks)
    name = section.dataset
    if name.startswith(HUB_PREFIX) or name in bundled():
        return
    if name.endswith((".txt", *JSONL_SUFFIXES)):
        check_file(Path(name))
    else:
        open_dataset(name)  # raises, and says why
