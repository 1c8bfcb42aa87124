"""MODEL on the command line -> a local directory of safetensors.

A local directory stays where it is, a hub id is downloaded, a GGUF file is dequantized once to
float16 into the cache, `demo:smollm2` is a GGUF file that `modeling.demo` fetches.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class Location:
    """A model on this machine."""

    directory: Path
    public_name: str | None
    """Hub id or demo name; None for local files, whose paths are nobody's business."""


def locate(model: str) -> Location:
    """Find or fetch a model.

    Args:
        model: Local directory, hub id, `.gguf` file, or `demo:smollm2`.

    Raises:
        ModelError: there is no such model, or it can't be fetched.
        MissingExtraError: what reads GGUF files isn't installed.
    """
    path = local_path(model)
    if path is None:
        return Location(_download(model), model)
    directory = convert_gguf(path) if path.is_file() else path
    return Location(directory, model if model.startswith("demo:") else None)


def check_model(model: str) -> None:
    """Raise unless a model is there, so that a typo is found before another model has run.

    One of the hub is downloaded: only the hub knows it. Nothing is read or converted.

    Raises:
        ModelError: as `locate`.
        MissingExtraError: as `locate`.
    """
    if local_path(model) is None:
        _download(model)


def config_directory(model: str) -> Path | None:
    """Return the directory of a model's config.json, which alone is fetched from the hub.

    None: a GGUF file, which has none.

    Raises:
        ModelError: there is no such model.
        MissingExtraError: the demo model's package isn't installed.
    """
    path = local_path(model)
    if path is None:
        return _download(model, CONFIG)
    return path if path.is_dir() else None


def local_path(model: str) -> Path | None:
    """Return the directory or the GGUF file that a name means; None: the hub may have it.

    Nothing is read, converted or downloaded, so that a typo is found at once.

    Raises:
        ModelError: there is no such model.
        MissingExtraError: the demo model's package isn't installed.
    """
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
            f"No local directory {model!r}, and the hub didn't give a model of that id: {first}"
        ) from error
