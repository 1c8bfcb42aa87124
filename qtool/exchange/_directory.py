"""A directory as transformers lays it out, written one layer at a time."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.base import Progress
from qtool.checkpoint.assemble import write_streamed
from qtool.checkpoint.marks import CONFIG_NAME
from qtool.checkpoint.writer import MAX_SHARD_BYTES
from qtool.exchange import Departure
from qtool.storage.plain_json import write_config_file
from qtool.storage.whole_files import written_whole

WRITING_FILES = "writing"
COMPARING_FILES = "comparing with what was written"


def write_directory(
    departure: Departure,
    directory: Path,
    layers: Iterable[tuple[str, Mapping[str, Tensor]]],
    quantization: Mapping[str, Any] | None,
) -> None:
    """Write a model: shards, companions, and config.json last.

    Args:
        departure: What gives companions and configuration.
        directory: Isn't there yet.
        layers: Names, and tensors by full name; each is dropped before the next is made.
        quantization: `quantization_config`; None: the model isn't quantized.

    Raises:
        OSError: it can't be written; only the caller knows its name in the end.
    """
    directory.mkdir(parents=True)
    write_streamed(directory, told(departure, layers), MAX_SHARD_BYTES)
    for path, content in departure.files.items():
        with written_whole(directory / path, durable=True) as file:
            file.write(content)
    write_config_file(directory / CONFIG_NAME, foreign_config(departure, quantization))


def told(
    departure: Departure,
    layers: Iterable[tuple[str, Mapping[str, Tensor]]],
    what: str = WRITING_FILES,
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield layers, as `write_directory` takes them; tell of each once it is done with.

    Args:
        departure: Is told.
        layers: Names, and tensors by full name.
        what: Is done with them.
    """
    total = len(list(departure.checkpoint.names()))
    for number, (name, tensors) in enumerate(layers, start=1):
        yield name, tensors
        del tensors
        departure.emit(Progress(what, number, total, name))


def foreign_config(departure: Departure, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return config.json of the result."""
    config = departure.checkpoint.plain_config()
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = departure.dtype
    return config if quantization is None else {**config, "quantization_config": quantization}
