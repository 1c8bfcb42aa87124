"""Scores that were measured before, under a digest of all that decides them."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import qtool
from qtool.evaluation.scores import Score, TaskScores
from qtool.modeling.locate import cache_dir

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
SWITCHES = ("QTOOL_BACKEND", "QTOOL_KERNEL", "QTOOL_RUNNER", "QTOOL_DEPENDENT_LAUNCHES")


def versions() -> dict[str, str]:
    """Return the versions that scores depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    for name in OPTIONAL_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"qtool": qtool.__version__, **found}


def switches() -> dict[str, str]:
    """Return the environment variables that change how a model is executed."""
    return {name: os.environ[name] for name in SWITCHES if os.environ.get(name)}


def model_digest(directory: Path) -> str:
    """Return one digest of a model's weights, configuration and tokenizer."""
    return files_digest(file for pattern in MODEL_FILES for file in directory.glob(pattern))


def files_digest(files: Iterable[Path]) -> str:
    """Return one digest of the names and contents of some files."""
    whole = hashlib.sha256()
    for file in sorted(set(files)):
        with file.open("rb") as opened:
            whole.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


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

    def read(self) -> TaskScores | None:
        """Return the scores, if they are there and whole."""
        try:
            values = json.loads((self.directory / "scores.json").read_text(encoding="utf-8"))
            scores = tuple(_score(one) for one in values.pop("scores"))
            return replace(TaskScores(scores=scores, **values), cached=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not ours, or cut
            return None

    def write(self, scores: TaskScores) -> None:
        """Keep scores; a reader sees all of them or none."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / "scores.json.partial"
        partial.write_text(json.dumps(asdict(scores), default=str), encoding="utf-8")
        partial.replace(self.directory / "scores.json")


def _score(values: dict[str, Any]) -> Score:
    items = tuple(tuple(one) if isinstance(one, list) else one for one in values.pop("items"))
    return Score(items=items, **values)
