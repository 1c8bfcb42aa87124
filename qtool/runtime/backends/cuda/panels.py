"""The layout in which the GPU kernels read bit planes whose groups run along out_features.

A group of rows is padded to whole tiles of 16 and cut into equal *panels*: rows that share the
scales of each column. Of a panel, units of 256 inputs follow one another, of a unit its tiles, each
as `tiles` packs it: kernels stage the inputs of a unit times its scales once for all these tiles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.packing import unpack_bits
from qtool.runtime.backends.cuda.centers import CENTERS
from qtool.runtime.backends.cuda.tiles import (
    BITS_AT_ONCE,
    HALF_BYTES,
    LANES,
    TILE_ROWS,
    UNIT,
    WORD_BYTES,
    WORDS,
    pack_planes,
    unpack_planes,
)
from qtool.scheme import Shape2D, WeightScheme

MOST_TILES = 8
"""Of a panel: rows that one staging serves, and sums that a warp has."""
LEAST_ROWS = TILE_ROWS // 2
"""Of a group: of fewer, padding would be more than half of the planes."""


class PanelLayout(NamedTuple):
    """What the constants of the kernels say about a weight."""

    planes: int
    tiles: int
    """Of a panel."""
    offset: int
    """As in `planes.Layout`."""
    sets: int = 1
    """2: panels of gate and up alternate."""

    @property
    def macros(self) -> dict[str, int]:
        """Return the constants themselves."""
        named = {"PLANES": self.planes, "TILES": self.tiles, "OFFSET": self.offset}
        return {**named, "SETS": self.sets}


class Paneling(NamedTuple):
    """How the rows of a weight are cut into panels."""

    group_rows: int
    """As the scheme says; the last group may have fewer."""
    groups: int
    panels: int
    """Of a group."""
    tiles: int
    """Of a panel."""

    @property
    def padded_rows(self) -> int:
        """Return the rows of a group with its padding."""
        return self.panels * self.tiles * TILE_ROWS


def paneling(scheme: WeightScheme, out_features: int) -> Paneling:
    """Cut groups of rows into the fewest equal panels."""
    rows = min(scheme.group_size or out_features, out_features)
    tiles = -(-rows // TILE_ROWS)
    panels = -(-tiles // MOST_TILES)
    return Paneling(rows, -(-out_features // rows), panels, -(-tiles // panels))


def is_panelable(tensor: QuantizedTensor) -> bool:
    """Return whether the panel kernels take the groups of a weight of planes."""
    rows = tensor.scheme.group_size or tensor.shape.out_features
    return tensor.scheme.group_dim == "out_features" and rows >= LEAST_ROWS


@dataclass(frozen=True, slots=True)
class Panels:
    """A binary-coded weight with groups along out_features, re-laid for the kernels."""

    planes: Tensor  # (groups * panels, units, sets, tiles, num_bits, 32, 4) int32
    scales: Tensor
    """(groups, units, sets, num_bits + offset, 256) float16: the offset, or the center of an affine
    weight, last; zeros where there is no input."""
    group_rows: int

    @property
    def of_group(self) -> int:
        """Return how many panels a group has."""
        return len(self.planes) // len(self.scales)

    @property
    def sets(self) -> int:
        """Return 2 if rows of gate and up alternate, else 1."""
        return self.planes.shape[2]


def pack_panels(tensor: QuantizedTensor) -> Panels:
    """Re-lay a weight of format `binary_coding` with groups along out_features."""
    (rows, inputs), bits = tensor.shape, tensor.scheme.num_bits
    cut = paneling(tensor.scheme, rows)
    groups_at_once = max(1, BITS_AT_ONCE // (bits * inputs * cut.padded_rows))
    packed = [
        _pack_groups(words, cut, inputs)
        for words in tensor.parts["bit_planes"].split(groups_at_once * cut.group_rows, dim=1)
    ]
    planes = packed[0] if len(packed) == 1 else torch.cat(packed)
    return Panels(planes, _pack_scales(tensor), cut.group_rows)


def _pack_groups(words: Tensor, cut: Paneling, inputs: int) -> Tensor:
    """Pack planes (num_bits, rows of whole groups but for the last, words)."""
    bits = unpack_bits(words, inputs)
    whole = torch.nn.functional.pad(bits, (0, -inputs % UNIT, 0, -bits.shape[1] % cut.group_rows))
    groups = whole.unflatten(1, (-1, cut.group_rows))
    padded = torch.nn.functional.pad(groups, (0, 0, 0, cut.padded_rows - cut.group_rows))
    tiled = pack_planes(padded.flatten(1, 2).contiguous())  # (tiles, units, num_bits, 32, 4)
    return tiled.unflatten(0, (-1, cut.tiles)).transpose(1, 2).unsqueeze(2).contiguous()


def _pack_scales(tensor: QuantizedTensor) -> Tensor:
    """Re-lay scales, then offsets or centers, each (groups, in_features), by units."""
    listed = list(tensor.parts["plane_scales"])
    if not tensor.scheme.symmetric:
        listed.append(tensor.parts.get("plane_offsets", tensor.parts.get(CENTERS)))
    stacked = torch.stack(listed)
    padded = torch.nn.functional.pad(stacked, (0, -stacked.shape[2] % UNIT))
    return padded.unflatten(2, (-1, UNIT)).permute(1, 2, 0, 3).unsqueeze(2).contiguous()


def panels_bytes(scheme: WeightScheme, shape: Shape2D) -> int:
    """Return what `pack_panels` takes, from scheme and shape alone."""
    cut, units = paneling(scheme, shape.out_features), -(-shape.in_features // UNIT)
    tile_bytes = units * scheme.num_bits * LANES * WORDS * WORD_BYTES
    parameters = scheme.num_bits + (not scheme.symmetric)
    scales = units * UNIT * parameters * HALF_BYTES
    return cut.groups * (cut.panels * cut.tiles * tile_bytes + scales)


def unpack_panels(packed: Panels, shape: Shape2D) -> tuple[Tensor, Tensor]:
    """Return scales, then offsets or centers, of each weight, and its signs.

    Of rows that alternate: those of gate, then those of up, each padded as the whole.

    Returns:
        (parameters, out_features, in_features) and (num_bits, out_features, in_features) float32.
    """
    planes, (rows, inputs), sets = packed.planes, shape, packed.sets
    groups, rows = len(packed.scales), rows // sets
    # sets, panels and tiles first, then units
    tiled = planes.permute(2, 0, 3, 1, 4, 5, 6).flatten(0, 2)
    bits = unpack_planes(tiled)  # (num_bits, sets * groups * padded rows, inputs)
    by_group = bits.unflatten(1, (sets, groups, -1))[:, :, :, : packed.group_rows, :inputs]
    signs = 2 * by_group.flatten(2, 3)[:, :, :rows].flatten(1, 2).float() - 1
    scales = packed.scales.permute(3, 2, 0, 1, 4).flatten(3)[..., :inputs].float()
    spread = scales.repeat_interleave(packed.group_rows, dim=2)[:, :, :rows]
    return spread.flatten(1, 2), signs
