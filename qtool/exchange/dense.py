"""Any checkpoint as an unquantized model: what its codes mean, in a dtype of floats."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.shards import open_shards
from qtool.exchange import Compared, Departure, Exchange, LayerPlace
from qtool.exchange._compare import OWN_READER, check_equal
from qtool.exchange._directory import COMPARING_FILES, told, write_directory
from qtool.formats._dtypes import dtype_of

WEIGHT_PART = "weight"


def _refuses(entry: LayerEntry, _place: LayerPlace) -> str | None:
    if entry.activation is not None:
        return "its inputs are quantized while it runs, which floats can't say"
    return None


def _layers(departure: Departure) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    checkpoint = departure.checkpoint
    for name in checkpoint.names():
        entry = checkpoint.manifest.layers.get(name)
        if entry is None:
            yield name, {name: plain(departure, name)}
        elif entry.shared_with is None:
            yield name, {f"{name}.{WEIGHT_PART}": rounded_weight(departure, name)}


def plain(departure: Departure, name: str) -> Tensor:
    """Return a tensor that isn't quantized, floats in the dtype of the result."""
    values = departure.checkpoint.load(name)
    assert isinstance(values, Tensor)
    return values.to(dtype_of(departure.dtype)) if values.is_floating_point() else values


def rounded_weight(departure: Departure, name: str) -> Tensor:
    """Return what the codes of a layer mean, as its module stores it, rounded once."""
    tensor = departure.checkpoint.load(name)
    assert isinstance(tensor, QuantizedTensor)
    weight = codec(tensor.format).dequantize(tensor, torch.float32)
    weight = weight.T.contiguous() if name in departure.transposed else weight
    return weight.to(dtype_of(departure.dtype))


def _write(departure: Departure, directory: Path) -> None:
    write_directory(departure, directory, _layers(departure), None)


def _compare(departure: Departure, directory: Path) -> Compared:
    shards, layers, others = open_shards(directory), 0, 0
    for name, tensors in told(departure, _layers(departure), COMPARING_FILES):
        for full, expected in tensors.items():
            check_equal(directory, full, shards.read(full), expected)
        layers += name in departure.checkpoint.manifest.layers
        others += name not in departure.checkpoint.manifest.layers
    return Compared(layers=layers, tensors=others, by=OWN_READER)


EXCHANGE = Exchange(
    summary="An unquantized model; takes every weight, and rounds it once to --dtype.",
    takes_floats=True,
    refuses=_refuses,
    write=_write,
    compare=_compare,
)
