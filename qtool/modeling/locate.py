"""MODEL on the command line -> a local directory of safetensors.

A local directory stays where it is, a hub id is downloaded, a GGUF file is dequantized once to
float16 into the cache, `demo:smollm2` is a GGUF file that `modeling.demo` fetches.
"""

import hashlib
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import MissingExtraError, ModelError
from qtool.modeling.demo import demo_file
from qtool.storage.cache import cache_dir

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


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
    if model.startswith("demo:"):
        return Location(convert_gguf(demo_file(model)), model)
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"No GGUF file {path}.")
        return Location(convert_gguf(path), None)
    if path.is_dir():
        return Location(path, None)
    if path.exists():
        raise ModelError(f"{path} is a file; give the model's directory, or a .gguf file.")
    if HUB_ID.fullmatch(model) and not model.startswith("."):
        return Location(_download(model), model)
    raise ModelError(f"No model directory {path}. Give a directory, a .gguf file or a hub id.")


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download  # slow import

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"No local directory {model!r}, and the hub didn't give a model of that id: {reason}"
        ) from error


def convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a float16 directory in the cache, unless it is there already."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_dir() / "gguf" / digest
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"Reading {path.name}", "demo")
    partial = target.with_name(f"{digest}.{os.getpid()}.partial")
    try:
        _save_dequantized(path, partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():  # else another process was faster
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _save_dequantized(path: Path, target: Path) -> None:
    import torch  # slow imports
    import transformers

    transformers.utils.logging.disable_progress_bar()
    quantization = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float16, **quantization
        )
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        # A fresh model: the loaded one refuses to be saved, being marked as quantized.
        model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float16)
        model.load_state_dict(loaded.state_dict(), strict=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers and gguf raise many unrelated types
        raise ModelError(f"{path}: transformers can't read this GGUF file: {error}") from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
