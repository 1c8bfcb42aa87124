"""A checkpoint of a mixture of experts as other programs see one: an expert's linears by name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qtool.base import CausalModel, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.experts import ExpertName, expert_name
from qtool.modeling.expert_layout import ExpertLayout, ExpertPiece, expert_layouts, name_in_files
from qtool.scheme import Shape2D

_WEIGHT = ".weight"


class ExpertCheckpoint(CheckpointReader):
    """A checkpoint whose layers of experts have the names and rows that files have.

    Where files hold one tensor of all experts it is one here too, of floats: nothing is quantized
    then, and only exchanges that write floats may take it.
    """

    def __init__(self, directory: Path, model: CausalModel) -> None:
        """Open it.

        Args:
            directory: Of the checkpoint.
            model: As transformers builds it, without memory.

        Raises:
            CheckpointError: it is missing, incomplete, damaged, or not qtool's.
            ModelError: transformers can't say how files hold the experts.
        """
        super().__init__(directory)
        layouts = expert_layouts(model)
        self._renamed: dict[str, str] = {}
        """Our name of what isn't of an expert, by that in files, where they differ."""
        self._own = CheckpointReader(directory)
        self._pieces: dict[str, tuple[str, ExpertPiece]] = {}
        """By name, of which layer of ours it is, and which rows of that."""
        self._whole: dict[str, tuple[str, ExpertLayout]] = {}
        """By full name, the fused weight."""
        self._names: list[str] = []
        self._last: tuple[str, QuantizedTensor | Tensor] | None = None
        layers: dict[str, LayerEntry] = {}
        for name in self._own.names():
            entry = self._own.manifest.layers.get(name)
            expert = expert_name(name if entry is not None else name.removesuffix(_WEIGHT))
            if expert is None:
                there = self._named(model, name, is_layer=entry is not None)
                self._names.append(there)
                layers |= {} if entry is None else {there: entry}
                continue
            layout = layouts[expert.fused]
            for one in self._placed(name, expert, layout, is_layer=entry is not None):
                self._names.append(one)
                if entry is not None and one in self._pieces:
                    layers[one] = _of_rows(entry, self._pieces[one][1].count)
        self.manifest = replace(self.manifest, layers=layers)

    def _named(self, model: CausalModel, name: str, *, is_layer: bool) -> str:
        """Return and note what files call something that isn't of an expert."""
        full = f"{name}{_WEIGHT}" if is_layer else name
        found = name_in_files(model, full)
        there = found.removesuffix(_WEIGHT) if is_layer else found
        if there != name:
            self._renamed[there] = name
        return there

    @property
    def joined(self) -> str | None:
        """Return the name of a tensor of all experts, if there is one."""
        return next(iter(self._whole), None)

    def linears(self) -> tuple[str, ...]:
        """Return the experts' linears by the names that files have."""
        return tuple(name.removesuffix(_WEIGHT) for name in self._pieces)

    def _placed(
        self, name: str, expert: ExpertName, layout: ExpertLayout, *, is_layer: bool
    ) -> Iterator[str]:
        """Note where an expert's weight goes; yield the names that are new."""
        if not layout.pieces:
            if layout.fused not in self._whole:
                yield layout.fused
            self._whole[layout.fused] = expert.fused, layout
            return
        for piece in layout.pieces[expert.number]:
            own = piece.name.removesuffix(_WEIGHT) if is_layer else piece.name
            self._pieces[own] = name, piece
            yield own

    def names(self) -> Iterator[str]:
        """Yield the names of the quantized layers, then of all other tensors."""
        yield from (name for name in self._names if name in self.manifest.layers)
        yield from (name for name in self._names if name not in self.manifest.layers)

    def load(self, name: str) -> QuantizedTensor | Tensor:
        """Return a quantized layer by its dotted name, or another tensor by its full name.

        Raises:
            CheckpointError: a file has become unreadable, or scales aren't numbers that scale.
        """
        if name in self._whole:
            return self._joined(*self._whole[name])
        if name not in self._pieces:
            return self._own.load(self._renamed.get(name, name))
        owner, piece = self._pieces[name]
        if self._last is None or self._last[0] != owner:
            self._last = None
            self._last = owner, self._own.load(owner)
        held = self._last[1]
        if isinstance(held, Tensor):
            return held[piece.start : piece.start + piece.count].clone()
        return codec(held.format).narrow(held, 0, piece.start, piece.count)

    def _joined(self, fused: str, layout: ExpertLayout) -> Tensor:
        """Return a weight of all experts as the model has it, float32."""
        weights = [self._weight(f"{fused}[{number}]") for number in range(layout.num_experts)]
        stacked = torch.stack(weights)
        return stacked.transpose(1, 2).contiguous() if layout.is_transposed else stacked

    def _weight(self, layer: str) -> Tensor:
        if layer not in self._own.manifest.layers:
            kept = self._own.load(layer + _WEIGHT)
            assert isinstance(kept, Tensor)
            return kept.float()
        tensor = self._own.load(layer)
        assert isinstance(tensor, QuantizedTensor)
        return codec(tensor.format).dequantize(tensor, torch.float32)


def _of_rows(entry: LayerEntry, rows: int) -> LayerEntry:
    return replace(entry, shape=Shape2D(rows, entry.shape.in_features))
