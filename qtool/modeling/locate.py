"""MODEL on the command line -> a `Location`, which all below the command line takes.

A local directory stays where it is, a hub id is downloaded, a GGUF file is dequantized once to
float16 into the cache, `demo:smollm2` is a GGUF file that `modeling.demo` fetches.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qtool.base import Emit, Progress, ignore_events
from qtool.errors import ModelError
from qtool.modeling.demo import demo_file
from qtool.modeling.gguf_cache import convert_gguf
from qtool.wording import reason

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]
HUB_ALSO = ["*.jinja", "LICENSE*", "NOTICE*"]
CONFIG = ["config.json"]
HUB_NOT = [*(f"*/{name}" for name in HUB_FILES), "consolidated*.safetensors"]
"""Other formats, precisions and parts of a pipeline: to the hub a `*` is slashes too."""


@dataclass(frozen=True)
class Location:
    """A model, and where it is once its directory is asked for."""

    path: Path | None
    """Directory or GGUF file; None: the hub has it."""
    public_name: str | None = None
    """Hub id or demo name; None for local files, whose paths are nobody's business."""
    adapter: Path | None = None
    """Directory of an adapter that is set when the model is loaded; None: the model as it is."""
    emit: Emit = field(default=ignore_events, compare=False, repr=False)
    """Is told of what takes long: downloading, converting, loading. Stays in its process."""

    @cached_property
    def directory(self) -> Path:
        """Safetensors and config.json: downloaded or converted the first time.

        Raises:
            ModelError: it can't be fetched or converted.
            MissingExtraError: what reads GGUF files isn't installed.
        """
        if self.path is None:
            self.emit(Progress(f"fetching {self.public_name}"))
            return _download(str(self.public_name))
        return convert_gguf(self.path, self.emit) if self.path.is_file() else self.path

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets."""
        return {**self.__dict__, "emit": ignore_events}

    def config_directory(self) -> Path | None:
        """Return the directory of config.json, which alone is fetched from the hub.

        None: a GGUF file, which has none.

        Raises:
            ModelError: the hub doesn't have it.
        """
        if self.path is None:
            return _download(str(self.public_name), CONFIG)
        return self.path if self.path.is_dir() else None

    @property
    def name(self) -> str:
        """What to call it in results: public name, else that of the directory or GGUF file."""
        name = self.public_name or (self.path or self.directory).resolve().name
        return name if self.adapter is None else f"{name} with {self.adapter.resolve().name}"


def locate(model: str) -> Location:
    """Find a model; nothing is read, converted or downloaded, so that a typo is found at once.

    Args:
        model: Local directory, hub id, `.gguf` file, or `demo:smollm2`.

    Raises:
        ModelError: there is no such model.
        MissingExtraError: the demo model's package isn't installed.
    """
    path = _local_path(model)
    is_public = path is None or model.startswith("demo:")
    return Location(path, model if is_public else None)


def _local_path(model: str) -> Path | None:
    """Return the directory or the GGUF file that a name means; None: the hub may have it."""
    if model.startswith("demo:"):
        return demo_file(model)
    try:
        path = Path(model).expanduser()
        is_file, is_directory = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long; nobody's home
        raise ModelError(f"No model {model[:100]!r}: {reason(error)}.") from error
    if model.endswith(".gguf"):
        if not is_file:
            raise ModelError(f"No GGUF file {path}.")
        return path
    if is_directory:
        return path
    if is_file:
        raise ModelError(f"{path} is a file; give the model's directory, or a .gguf file.")
    if HUB_ID.fullmatch(model) and not model.startswith("."):
        return None
    raise ModelError(f"No model directory {path}. Give a directory, a .gguf file or a hub id.")


def _download(model: str, files: Sequence[str] = (*HUB_FILES, *HUB_ALSO)) -> Path:
    from huggingface_hub import snapshot_download  # slow import

    try:
        return Path(snapshot_download(model, allow_patterns=list(files), ignore_patterns=HUB_NOT))
    except Exception as error:  # the hub client raises many unrelated types
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"No local directory {model!r}, and the hub didn't give a model of that id: "
            f"{first.removeprefix('Got: ').rstrip('.')}. Look at the spelling, and at the network; "
            "allowed are a directory, a hub id, a .gguf file, and demo:smollm2."
        ) from error
