"""What tells a model from every other: its weights, its configuration, its tokenizer."""

from collections.abc import Mapping
from pathlib import Path

from qtool.modeling.companions import GENERATION, TEMPLATE_FOLDER, TEMPLATES, TOKENIZER
from qtool.storage.digests import State, files_digest, state_of

PATTERNS = (
    *("*.safetensors", "model.safetensors.index.json", "config.json"),
    *(*TOKENIZER, *TEMPLATES, *GENERATION),
)
"""What of a model's directory decides what it answers; templates in a folder do so too."""


def model_digest(directory: Path, *, remember: bool = True) -> str:
    """Return one digest of a model's weights, configuration and tokenizer.

    Args:
        directory: Of the model.
        remember: Don't read files again that are as they were when an earlier call read them.

    Raises:
        OSError: a file can't be read.
    """
    return files_digest(_model_files(directory), remember=remember)


def model_states(directory: Path) -> Mapping[str, State]:
    """Return what changes with each write to the files that `model_digest` reads."""
    files = _model_files(directory)
    return {file.relative_to(directory).as_posix(): state_of(file) for file in files}


def _model_files(directory: Path) -> list[Path]:
    patterns = (*PATTERNS, f"{TEMPLATE_FOLDER}/*.jinja")
    return [file for pattern in patterns for file in directory.glob(pattern) if not file.is_dir()]
