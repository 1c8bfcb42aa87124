"""What `qtool bench --gpu` times: the layers and the whole model of a checkpoint, or of shapes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qtool.base import CausalModel, QuantizedTensor
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda.mixed import prepare_weight
from qtool.runtime.backends.cuda.selection import STORED_KERNELS
from qtool.runtime.decode.read_model import weights_of, why_not
from qtool.runtime.decode.weights import DecoderWeights, Projections
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from qtool.runtime.spread import spread_model
from qtool.runtime.tensor_parallel import TensorParallel
from qtool.scheme import WeightScheme
from qtool.timing.decode import EndToEnd
from qtool.timing.kernels import Layer, Timeable
from qtool.timing.quantized_inputs import InputCase
from qtool.timing.shapes import LinearShape, ModelShape
from qtool.timing.synthetic import DTYPE, generator_on, random_decoder, random_weight


@dataclass(frozen=True, slots=True)
class Workload:
    """Layers to time one by one, and models to run as a whole."""

    name: str
    layers: tuple[Layer, ...]
    models: tuple[EndToEnd, ...]
    """The quantized one first, then the float16 baseline."""
    no_models: str = ""
    """Why there are none."""
    quantized_inputs: tuple[InputCase, ...] = ()
    """Linears whose inputs are quantized."""


def synthetic_workload(
    name: str, shape: ModelShape, scheme: WeightScheme, kernel: str | None, device: torch.device
) -> Workload:
    """Return random weights of known shapes, made on the device when their turn comes."""

    def layer(linear: LinearShape) -> Layer:
        def load() -> Timeable:
            own, keep_stored = linear.scheme(scheme), _keeps_stored(kernel)
            return random_weight(linear.shape, own, generator_on(device), keep_stored=keep_stored)

        return Layer(linear.name, linear.count, load)

    layers = tuple(map(layer, shape.linears))
    decoder = shape.decoder
    if decoder is None:
        return Workload(name, layers, (), f"{name} is the shapes of one block, not a whole model.")
    kinds = {f"{name}, {scheme.num_bits} bits": scheme, f"{name}, float16": None}
    models = (EndToEnd(n, partial(random_decoder, decoder, s, device)) for n, s in kinds.items())
    return Workload(name, layers, tuple(models))


def checkpoint_workload(
    model: Location, baseline: Location | None, kernel: str | None, device: torch.device
) -> Workload:
    """Return the layers of a checkpoint, one per shape and scheme, and the models to run.

    Layers that share an input are fused as the decode runner fuses them; as stored, if it doesn't
    run the model or the kernel asked for reads stored parts.
    """
    loaded = load_model(model, device=device, dtype=DTYPE)
    reason = why_not(loaded.model)
    if reason is None and kernel not in STORED_KERNELS:
        layers = distinct(_fused(weights_of(loaded.model, backend=cuda.BACKEND)), kernel)
    else:
        layers = distinct(_stored(loaded.model), kernel)
    wanted = [] if reason else [one for one in (model, baseline) if one is not None]
    models = tuple(_whole(one, device) for one in wanted)
    return Workload(loaded.name, layers, models, reason or "")


def _whole(model: Location, device: torch.device) -> EndToEnd:
    return EndToEnd(model.public_name or str(model.path), partial(_load, model, device))


def _load(
    model: Location, device: torch.device, group: TensorParallel | None = None
) -> DecoderWeights:
    """Load a model; of a group, each rank loads it whole into the host's memory first."""
    first = device if group is None else torch.device("cpu")
    loaded = load_model(model, device=first, dtype=DTYPE).model
    return weights_of(spread_model(loaded, group), backend=cuda.BACKEND)


def distinct(
    weights: Iterable[tuple[str, Timeable | QuantizedTensor]], kernel: str | None
) -> tuple[Layer, ...]:
    """Return one layer per shape and scheme, in the order of their first, with their count."""
    groups: dict[Any, list[tuple[str, Timeable | QuantizedTensor]]] = {}
    for name, weight in weights:
        groups.setdefault((weight.shape, weight.scheme), []).append((name, weight))
    return tuple(
        Layer(alike[0][0], len(alike), partial(_prepared, alike[0][1], kernel))
        for alike in groups.values()
    )


def _prepared(weight: Timeable | QuantizedTensor, kernel: str | None) -> Timeable:
    if not isinstance(weight, QuantizedTensor):
        return weight
    return prepare_weight(weight, DTYPE, keep_stored=_keeps_stored(kernel))


def _keeps_stored(kernel: str | None) -> bool | None:
    """Return whether a kernel reads stored parts; None: none is asked for."""
    return kernel in STORED_KERNELS if kernel else None


def _stored(model: CausalModel) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield the quantized linears of a model, and a head tied to its quantized embedding."""
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, QuantizedLinear):
            yield last, module.tensor()
        elif isinstance(module, TiedHead) and isinstance(embedding, QuantizedEmbedding):
            yield last, embedding.tensor()


def _fused(decoder: DecoderWeights) -> Iterator[tuple[str, Timeable]]:
    """Yield the quantized projections that a decoding step runs."""
    named: list[tuple[str, Projections]] = []
    for layer in decoder.layers:
        named += [("qkv", layer.qkv), ("o", layer.output)]
        if layer.down is not None:
            named += [("gate_up", layer.gate_up), ("down", layer.down)]
    for name, projection in [*named, ("lm_head", decoder.head)]:
        parts = projection if isinstance(projection, tuple) else (projection,)
        yield from ((name, part) for part in parts if isinstance(part, Timeable))
