"""What is measured of one model, and what its directory says of it without loading it."""

import platform
from dataclasses import dataclass
from math import prod
from pathlib import Path

import qtool
from qtool.checkpoint.marks import REPORT_NAME
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards, read_json
from qtool.errors import CheckpointError, ModelError
from qtool.evaluation.perplexity import PerplexityResult
from qtool.formats._dtypes import item_bytes
from qtool.modeling.config import parse_config, read_config
from qtool.modeling.load import check_weights, foreign_method
from qtool.modeling.locate import Location
from qtool.modeling.skeleton import empty_model
from qtool.timing.model import SpeedResult


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """All that was measured of one model."""

    name: str
    weight_bytes: int
    average_bits: float
    """Stored bits per weight of the quantized layers; without any that qtool knows, of all
    tensors."""
    quantize_seconds: float | None = None
    perplexity: PerplexityResult | None = None
    speed: SpeedResult | None = None


def figures_of(model: Location, *, foreign: bool = False) -> ModelFigures:
    """Return size and bits of a model, which its directory says without loading it.

    Args:
        model: Where it is.
        foreign: Whether it may be one that another tool has quantized.

    Raises:
        CheckpointError: files are missing or damaged, or aren't those of the configuration.
        ModelError: another tool has quantized it, and it may not.
    """
    name, directory = model.name, model.directory
    config = read_config(directory)
    method = foreign_method(config)
    if method is not None and not foreign:
        raise ModelError(
            f"{name} was quantized by another tool ({method}), and qtool can't "
            "measure that. Give the original or a model that qtool has quantized."
        )
    size = open_shards(directory).num_bytes()
    if method is None and "quantization_config" in config:
        bits = CheckpointReader(directory).manifest.average_bits()
        return ModelFigures(name, size, bits, quantize_seconds(directory))
    if method is None:
        check_weights(directory)
        specs = open_shards(directory).specs.values()
        weights = sum(prod(spec.shape) for spec in specs)
        stored = sum(prod(spec.shape) * 8 * item_bytes(spec.dtype) for spec in specs)
        return ModelFigures(name, size, stored / max(weights, 1))
    return ModelFigures(name, size, strict_bits(model))


def strict_bits(model: Location) -> float:
    """Return bits on disk per value of the whole model: embedding, head, norms, headers and all.

    Raises:
        CheckpointError: files are missing or damaged.
        ModelError: transformers can't build the model.
    """
    directory = model.directory
    config = read_config(directory)
    stored = 8 * open_shards(directory).num_bytes()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    values = sum(
        one.numel() for one in empty_model(parse_config(plain, directory), directory).parameters()
    )
    return stored / max(values, 1)


def quantize_seconds(directory: Path) -> float | None:
    """Return how long the quantization of a checkpoint took, if its report is there."""
    try:
        return float(read_json(directory / REPORT_NAME)["seconds"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import torch
    import transformers

    return {
        "qtool": qtool.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
