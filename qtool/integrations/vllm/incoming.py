"""Tensors of a checkpoint as vLLM hands them over, until all of a layer are there. No vLLM here."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.base import PartSpec, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.reader import AGAIN, check_values
from qtool.core.packing import codes_to_planes
from qtool.errors import CheckpointError
from qtool.formats._dtypes import dtype_of
from qtool.integrations.vllm.slices import PLAIN_PART, StoredLayer, Wanted, cut_for
from qtool.runtime.spread import AnyWeight
from qtool.scheme import ActivationScheme
from qtool.wording import list_names


@contextlib.contextmanager
def torchs_own_defaults() -> Iterator[None]:
    """Undo, while qtool works, that vLLM makes the dtype and device of the model the defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@dataclass(frozen=True, slots=True)
class RankWeight:
    """A weight of a layer, on this rank, and how its inputs are quantized."""

    weight: AnyWeight
    activation: ActivationScheme | None


@dataclass(slots=True)
class Incoming:
    """What has come of the stored layers of which vLLM makes one, cut to what this rank holds.

    A stored layer is cut as soon as it is complete, so that the host's memory holds whole ones one
    at a time.
    """

    sources: Sequence[StoredLayer]
    wanted: Sequence[Wanted]
    """Per source."""
    device: torch.device
    """Where the weights go."""
    _parts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _pieces: dict[int, list[RankWeight]] = field(default_factory=dict)

    def part_names(self) -> list[str]:
        """Return the names of all parts that may come, without repeats."""
        names = [name for source in self.sources for name in source.part_names()]
        return list(dict.fromkeys(names))

    @torchs_own_defaults()
    def add(self, number: int, part: str, values: Tensor) -> None:
        """Take a tensor of the stored layer of this number.

        Raises:
            CheckpointError: it isn't what the manifest says, or its numbers don't scale.
            BackendError: the layer can't be spread over the ranks.
        """
        source = self.sources[number]
        check_part(source, part, values)
        parts = self._parts.setdefault(number, {})
        parts[part] = values
        if parts.keys() == set(source.part_names()):
            pieces = cut_for(source, stored_weight(source, parts), self.wanted[number])
            activation = source.entry.activation if source.entry else None
            moved = [moved_to(self.device, piece) for piece in pieces]
            self._pieces[number] = [RankWeight(weight, activation) for weight in moved]
            del self._parts[number]

    def pieces(self) -> list[RankWeight]:
        """Return all weights, in the order of vLLM's; they aren't held any longer.

        Raises:
            CheckpointError: tensors are missing.
        """
        missing = [
            f"{source.name}.{part}"
            for number, source in enumerate(self.sources)
            if number not in self._pieces
            for part in source.part_names()
            if part not in self._parts.get(number, {})
        ]
        if missing:
            raise CheckpointError(f"The checkpoint lacks {list_names(missing)}. {AGAIN}")
        found = [piece for number in range(len(self.sources)) for piece in self._pieces[number]]
        self._pieces.clear()
        return found


def check_part(source: StoredLayer, part: str, values: Tensor) -> None:
    """Hold a tensor against what the manifest says of it.

    Raises:
        CheckpointError: it is another.
    """
    name = f"{source.name}.{part}"
    if part not in source.part_names():
        raise CheckpointError(
            f"{name} is no part of a layer that is stored as config.json says. {AGAIN}"
        )
    if source.entry is None:
        return
    spec = source.entry.layout()[part]
    if (values.dtype, tuple(values.shape)) != (dtype_of(spec.dtype), spec.shape):
        raise CheckpointError(
            f"{name} is {values.dtype} {tuple(values.shape)}; its scheme needs {spec.dtype} "
            f"{spec.shape}. {AGAIN}"
        )
    check_values(name, spec, values)


def stored_weight(source: StoredLayer, parts: Mapping[str, Tensor]) -> AnyWeight:
    """Return a stored layer as one value."""
    entry = source.entry
    if entry is None:
        return parts[PLAIN_PART]
    return QuantizedTensor(entry.format, entry.scheme, entry.shape, dict(parts))


def moved_to(device: torch.device, weight: AnyWeight) -> AnyWeight:
    """Return a copy on a device: a loader may use the memory of its tensors again."""
    if isinstance(weight, Tensor):
        return weight.to(device, copy=True)
    parts = {name: part.to(device, copy=True) for name, part in weight.parts.items()}
    return QuantizedTensor(weight.format, weight.scheme, weight.shape, parts)


def dummy_parts(entry: LayerEntry) -> dict[str, Tensor]:
    """Return parts of a layer that no file is read for: bits as they come, scales of 1 / 64.

    Classes of rows have the sizes that the scheme says.
    """
    return {name: _dummy(spec) for name, spec in entry.layout().items()}


def _dummy(spec: PartSpec) -> Tensor:
    if spec.counts:
        numbers = [number for number, count in enumerate(spec.counts) for _ in range(count)]
        codes = torch.tensor(numbers, dtype=torch.uint8)[None]
        return codes_to_planes(codes, spec.shape[0]).squeeze(1)
    if spec.is_order:
        return torch.arange(spec.shape[0], dtype=dtype_of(spec.dtype))
    if spec.dtype == "int32":
        return torch.randint(-(2**31), 2**31, spec.shape).to(torch.int32)
    return torch.full(spec.shape, 1 / 64, dtype=dtype_of(spec.dtype))
