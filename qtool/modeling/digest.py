"""What tells a model from every other: its weights, its configuration, its tokenizer."""

from collections.abc import Mapping
from pathlib import Path

from qtool.storage.digests import State, files_digest, state_of

PATTERNS = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.*",
    "*.jinja",
    "*.model",
)
"""What of a model's directory decides what it answers."""


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
    return {file.name: state_of(file) for file in _model_files(directory)}


def _model_files(directory: Path) -> list[Path]:
    return [file for pattern in PATTERNS for file in directory.glob(pattern)]
