"""Exchanges: models in the formats of other programs, read and written tensor by tensor.

One file per format, constant EXCHANGE; its name, with `-` for `_`, is what `--target` takes. A
weight is never held by more than one layer, and its numbers are never rounded: what an exchange
can't say exactly, it refuses by name.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qtool import plugins
from qtool.base import Emit
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import read_json
from qtool.scheme import ActivationScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.base import QuantizedTensor

LayerPlace = Literal["block", "embedding", "head"]
"""Where a layer stands in its model: in a decoder block, or one of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignModel:
    """A model in another format, known by its headers; each tensor is read when it is asked for."""

    config: Mapping[str, Any]
    """config.json of the model as if it weren't quantized."""
    layers: "Mapping[str, Callable[[], QuantizedTensor]]"
    """By dotted name, as transformers calls the module: reads a quantized layer, without loss.

    Raises CheckpointError where its tensors are damaged."""
    others: "Mapping[str, Callable[[], Tensor]]"
    """By full name: reads any other tensor as it is."""
    activations: Mapping[str, ActivationScheme] = field(default_factory=dict)
    """How the inputs of layers are quantized, where they are."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Name of a head -> of the quantized embedding whose parts it uses."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Companions that lie in no file of their own, such as a tokenizer inside a GGUF file; those
    of a directory are found by who asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A checkpoint of ours on its way into another format."""

    checkpoint: CheckpointReader
    """`names`, `load` and `spec` of its tensors, `manifest.layers` and `config`."""
    parsed: Any
    """Its configuration as transformers understands it, with its defaults."""
    places: Mapping[str, LayerPlace]
    """Of each layer of the manifest."""
    transposed: frozenset[str] = frozenset()
    """Layers whose modules store (in_features, out_features), as GPT-2's do; what `load` gives is
    (out_features, in_features) all the same."""
    linears: tuple[str, ...] = ()
    """All linears of the model, quantized or not."""
    files: Mapping[str, bytes]
    """Companions by relative path: tokenizer, chat template, generation, licences."""
    dtype: str = "float16"
    """Of what has no codes: float16, bfloat16 or float32."""
    is_dtype_asked: bool = False
    """Whether somebody has named it; a format that has floats of several dtypes keeps them else."""
    emit: Emit


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What came of reading a result back and comparing it with ours, bit by bit."""

    layers: int
    tensors: int
    """Others, beside the layers."""
    by: str
    """Whose functions have decoded it, such as `gptqmodel 7.7.0`, or `qtool's own reader`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The extension point: one file in `qtool/exchange` with the constant EXCHANGE."""

    summary: str
    """One sentence for documentation and messages: what it is and what it takes."""
    quant_method: str | None = None
    """What `quantization_config` of a directory in this format is marked with; None: it is none."""
    takes_floats: bool = False
    """It writes weights as floats, so that it takes experts that files hold in one tensor."""
    suffix: str | None = None
    """What the name of a file in this format ends with, such as `.gguf`; None: it is a directory,
    and so is what `write` writes."""
    read: Callable[[Path], ForeignModel] | None = None
    """(directory or file) -> its model; raises CheckpointError with the place. None: only
    written."""
    refuses: Callable[[LayerEntry, LayerPlace], str | None] | None = None
    """(entry, place) -> why a layer can't be written, as a clause such as `it has 3 bits, and 4 or
    8 are meant`, or None. None instead of a function: only read."""
    refuses_model: Callable[[Departure], str | None] = lambda _departure: None
    """Likewise of a model as a whole, as a sentence, such as of a family that it can't name."""
    write: Callable[[Departure, Path], None] | None = None
    """(departure, where to) -> a directory, or a file if there is a `suffix`; nothing is there yet.
    Holds one tensor at a time."""
    compare: Callable[[Departure, Path], Compared] | None = None
    """(departure, what `write` has written) -> that all is there to the bit, by the format's own
    library where that is installed; raises CheckpointError where it isn't."""


def exchange_names() -> tuple[str, ...]:
    """Return the sorted names of all exchanges, as `--target` takes them."""
    return plugins.command_names(sys.modules[__name__])


def load_exchange(name: str) -> Exchange:
    """Return an exchange by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    return plugins.load_named(sys.modules[__name__], name, "EXCHANGE", Exchange, "exchange")


def targets() -> Iterator[str]:
    """Yield the names of those that can be written."""
    return (name for name in exchange_names() if load_exchange(name).write is not None)


def exchange_of(path: Path) -> str | None:
    """Return the name of the exchange that reads a directory or file; None: none does.

    Raises:
        CheckpointError: a directory's config.json can't be read.
    """
    method = None if path.is_file() else quant_method_of(path)
    for name in exchange_names():
        exchange = load_exchange(name)
        if exchange.read is None:
            continue
        is_file_of = exchange.suffix is not None and path.name.endswith(exchange.suffix)
        if (path.is_file() and is_file_of) or (method and method == exchange.quant_method):
            return name
    return None


def quant_method_of(directory: Path) -> str | None:
    """Return what config.json calls who has quantized a model; None: nobody, or it doesn't say.

    Raises:
        CheckpointError: it is missing or no JSON.
    """
    section = read_json(directory / "config.json").get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    return method if isinstance(method, str) else None
