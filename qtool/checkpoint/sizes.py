"""What a checkpoint's bytes are for: by kind of tensor, down to the last byte on disk."""

import re
from dataclasses import dataclass
from math import prod

from qtool.checkpoint.kept_kinds import OUTSIDE_BLOCKS
from qtool.checkpoint.manifest import LayerEntry, num_bytes
from qtool.checkpoint.reader import CheckpointReader
from qtool.formats._dtypes import item_bytes
from qtool.formats.mixed_rows import class_layouts

QUANTIZED, AS_THEY_WERE = "linears of the blocks, quantized", "matrices of the blocks, as they were"
TABLES, VECTORS = "embedding and head", "norms and biases"
BESIDE = "matrices outside of the blocks"
"""Such as those of an encoder of images."""
KINDS = (QUANTIZED, AS_THEY_WERE, TABLES, BESIDE, VECTORS)
IN_A_BLOCK = re.compile(r"\.\d+\.")
"""In the name of a tensor: of a list of modules."""


@dataclass(frozen=True, slots=True)
class KindSize:
    """All tensors of one kind."""

    kind: str
    num_weights: int
    """Values of the original; what two layers share counts once."""
    num_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per value."""
        return 8 * self.num_bytes / self.num_weights


@dataclass(frozen=True, slots=True)
class DiskSizes:
    """A checkpoint's size, taken apart."""

    kinds: tuple[KindSize, ...]
    """Those that there are."""
    header_bytes: int
    """Of the weight files: names, shapes, padding."""

    @property
    def num_weights(self) -> int:
        """Values of the original, all of them."""
        return sum(each.num_weights for each in self.kinds)

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return self.header_bytes + sum(each.num_bytes for each in self.kinds)

    @property
    def strict_bits(self) -> float:
        """Bits on disk per value of the whole original: embedding, head, norms, headers and all."""
        return 8 * self.num_bytes / max(self.num_weights, 1)


@dataclass(frozen=True, slots=True)
class ClassSize:
    """Rows of one width of a layer whose rows have bits of their own."""

    num_bits: int
    num_rows: int
    num_weights: int
    num_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per value, with scales and offsets."""
        return 8 * self.num_bytes / self.num_weights


def class_sizes(entry: LayerEntry) -> tuple[ClassSize, ...]:
    """Return the size of each class of rows of a layer; empty: all its rows are alike.

    What the layer has beyond them says which class a row belongs to.
    """
    scheme, shape = entry.scheme, entry.shape
    layouts = class_layouts(scheme, shape) if scheme.rows else ()
    return tuple(
        ClassSize(num_bits, rows, rows * shape.in_features, sum(map(num_bytes, layout.values())))
        for (num_bits, rows), layout in zip(scheme.rows, layouts, strict=True)
    )


def sizes_of(reader: CheckpointReader) -> DiskSizes:
    """Return what the weight files of a checkpoint hold; reads headers only."""
    weights, stored = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name in reader.names():
        entry = reader.manifest.layers.get(name)
        in_a_block = IN_A_BLOCK.search(f".{name}.") is not None
        if entry is not None:
            kind = QUANTIZED if in_a_block else TABLES
            if entry.shared_with is None:
                weights[kind] += prod(entry.shape)
                stored[kind] += entry.num_bytes()
            continue
        spec = reader.spec(name)
        matrix = len(spec.shape) > 1
        kind = (AS_THEY_WERE if in_a_block else TABLES) if matrix else VECTORS
        if reader.manifest.unquantized.get(name, "").startswith(OUTSIDE_BLOCKS):
            kind = BESIDE
        weights[kind] += prod(spec.shape)
        stored[kind] += prod(spec.shape) * item_bytes(spec.dtype)
    kinds = tuple(KindSize(kind, weights[kind], stored[kind]) for kind in KINDS if weights[kind])
    return DiskSizes(kinds, reader.weight_bytes() - sum(stored.values()))
