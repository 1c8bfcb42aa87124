"""quantization_report.json: what a finished run reports, written and read again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

import qtool
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.marks import read_report
from qtool.checkpoint.place import Place
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError
from qtool.steps.solve import LayerResult
from qtool.storage.plain_json import json_text
from qtool.wording import quoted

NOT_METRICS = ("name", "group_dim", "fallback", "seconds")


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a finished run reports; written as quantization_report.json but for `out_dir`."""

    out_dir: Path
    average_bits: float
    weight_bytes: int
    source_bytes: int
    seconds: float
    peak_memory_bytes: int
    device: str
    layers: tuple[LayerResult, ...]


NUMBERS = ("average_bits", "weight_bytes", "source_bytes", "seconds", "peak_memory_bytes", "device")


def report_bytes(result: QuantizeResult, *, run: str, files: list[str]) -> bytes:
    """Return the content of the report.

    Args:
        result: Of the run.
        run: What tells it from all others; a run that has ended isn't done again.
        files: The names that it writes beside the weights, so that --overwrite knows them as ours.
    """
    values = asdict(result)
    layers = [
        {
            "name": layer.name,
            **layer.metrics,
            "group_dim": layer.entry.scheme.group_dim,
            "fallback": layer.fallback,
            "seconds": layer.seconds,
        }
        for layer in result.layers
    ]
    report = {
        "version of qtool": qtool.__version__,
        "run": run,
        "files": files,
        **{key: values[key] for key in NUMBERS},
        "layers": layers,
    }
    return (json_text(report) + "\n").encode()


def result_of(place: Place) -> QuantizeResult:
    """Return what the run reported whose result is there.

    Raises:
        CheckpointError: the report is missing or damaged.
    """
    report, entries = read_report(place.out_dir), CheckpointReader(place.out_dir).manifest.layers
    try:
        layers = tuple(_layer(values, entries) for values in report["layers"])
        numbers = {key: report[key] for key in NUMBERS}
        return QuantizeResult(out_dir=place.named, layers=layers, **numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{place.out_dir} is complete, but its quantization_report.json is damaged: "
            f"{quoted(error)}."
        ) from error


def _layer(values: Mapping[str, Any], entries: Mapping[str, LayerEntry]) -> LayerResult:
    metrics = {
        key: nan if value is None else float(value)
        for key, value in values.items()
        if key not in NOT_METRICS
    }
    name = values["name"]
    return LayerResult(name, entries[name], metrics, values["seconds"], values["fallback"])
