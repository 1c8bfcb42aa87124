"""A binary-coded weight as the kernels read it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.runtime.backends.cuda import planes, tiles
from qtool.runtime.backends.cuda.centers import weight_of
from qtool.runtime.backends.cuda.tiles import UNIT, Tiles
from qtool.scheme import Shape2D, WeightScheme


@dataclass(frozen=True, slots=True)
class KernelWeight:
    """A binary-coded weight, ready for the kernels."""

    scheme: WeightScheme
    shape: Shape2D
    dtype: torch.dtype
    """Of the activations."""
    tiles: Tiles | None
    """None: the tiled kernels can't group its inputs."""
    stored: QuantizedTensor | None
    """The parts as stored, if they were to be kept or there are no tiles."""
    centered: bool = False
    """Instead of offsets there are centers, see `centers`."""
    fresh: bool = False
    """Made just now on the device: kernels may not read it ahead."""

    def dense(self) -> Tensor:
        """Return W by the definition of its format, in torch: (out_features, in_features)."""
        if self.tiles is None:
            assert self.stored is not None
            return weight_of(self.stored).to(self.dtype)
        parameters, signs = tiles.unpack(self.tiles, self.shape, self.layout.group)
        offset = parameters[len(signs) :].sum(0)
        if self.centered:
            offset = offset * (parameters[0] * 2.0 ** (2 - len(signs)))
        return ((signs * parameters[: len(signs)]).sum(0) + offset).to(self.dtype)

    @property
    def layout(self) -> planes.Layout:
        """Return what the tiled kernels are compiled for."""
        inputs = self.shape.in_features
        size = self.scheme.group_size or inputs
        group = size if size < inputs else -(-inputs // UNIT) * UNIT
        offset = 2 if self.centered else int(not self.scheme.symmetric)
        return planes.Layout(self.scheme.num_bits, group, offset)
