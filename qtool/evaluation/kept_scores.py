"""Scores that were measured before, under a digest of all that decides them."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

import qtool
from qtool.evaluation.item_rows import keep_rows
from qtool.evaluation.local_data import Row
from qtool.evaluation.scores import TaskScores
from qtool.settings import cache_dir
from qtool.storage.digests import State, files_digest, state_of
from qtool.storage.whole_files import written_whole

LIBRARIES = ("torch", "transformers", "tokenizers", "lm-eval", "datasets")
OPTIONAL_LIBRARIES = ("cupy-cuda13x", "cupy-cuda12x", "triton", "numba")
"""What is installed of them decides what executes a model."""
MODEL_FILES = (
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
"""What of a model's directory decides its scores."""
_LOG = logging.getLogger(__name__)
SCORES = TypeAdapter(TaskScores)


def versions() -> dict[str, str]:
    """Return the versions that scores depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    for name in OPTIONAL_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"qtool": qtool.__version__, **found}


def model_digest(directory: Path, *, remember: bool = True) -> str:
    """Return one digest of a model's weights, configuration and tokenizer.

    Args:
        directory: Of the model.
        remember: Don't read files again that are as they were when an earlier call read them.
    """
    return files_digest(_model_files(directory), remember=remember)


def model_states(directory: Path) -> Mapping[str, State]:
    """Return what changes with each write to the files that `model_digest` reads."""
    return {file.name: state_of(file) for file in _model_files(directory)}


def _model_files(directory: Path) -> list[Path]:
    return [file for pattern in MODEL_FILES for file in directory.glob(pattern)]


def device_name(device: torch.device) -> str:
    """Return the name of the card, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class KeptScores:
    """The place of one task's scores, and of the answers of a run that didn't end."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {**settings, "versions": versions()}
        text = json.dumps(self.settings, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.directory = cache_dir() / "scores" / name

    @property
    def responses(self) -> Path:
        """Return the file of answers."""
        return self.directory / "responses.jsonl"

    @property
    def items(self) -> Path:
        """Return the file of what was asked and answered, one row per item."""
        return self.directory / "items.jsonl.gz"

    def read(self) -> TaskScores | None:
        """Return the scores, if they are there and whole."""
        try:
            content = (self.directory / "scores.json").read_bytes()
            return replace(SCORES.validate_json(content, strict=True), cached=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # not ours, cut, or of other types
            _LOG.warning("%s is damaged and is ignored.", self.directory / "scores.json")
            return None

    def write(self, scores: TaskScores, rows: Iterable[Row]) -> None:
        """Keep scores, after the rows of their items; a reader sees all of either or none."""
        keep_rows(self.items, rows)
        with written_whole(self.directory / "scores.json") as opened:
            opened.write(json.dumps(asdict(scores), default=str).encode())
