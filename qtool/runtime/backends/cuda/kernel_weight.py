"""A binary-coded weight as the kernels read it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.core.layout import RUN
from qtool.runtime.backends.cuda import planes, tiles
from qtool.runtime.backends.cuda.centers import CENTERS, planes_of, weight_of
from qtool.runtime.backends.cuda.panels import PanelLayout, Panels, unpack_panels
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
    """Of groups along in_features; None: they run along out_features, or the kernels can't group
    the inputs."""
    stored: QuantizedTensor | None
    """The parts as stored, if they were to be kept or there are neither tiles nor panels."""
    centered: bool = False
    """Instead of offsets there are centers, see `centers`."""
    fresh: bool = False
    """Made just now on the device: kernels may not read it ahead."""
    panels: Panels | None = None
    """Of groups along out_features."""

    def dense(self) -> Tensor:
        """Return W by the definition of its format, in torch: (out_features, in_features)."""
        if self.tiles is not None:
            parameters, signs = tiles.unpack(
                self.tiles, self.shape, self.layout.group, centered=self.centered
            )
        elif self.panels is not None:
            parameters, signs = unpack_panels(self.panels, self.shape)
        else:
            assert self.stored is not None
            return weight_of(self.stored).to(self.dtype)
        offset = parameters[len(signs) :].sum(0)
        if self.centered:
            offset = offset * (parameters[0] * 2.0 ** (2 - len(signs)))
        weight = ((signs * parameters[: len(signs)]).sum(0) + offset).to(self.dtype)
        if self.panels is not None and self.panels.sets > 1:  # as rows of tiles alternate
            return weight.unflatten(0, (self.panels.sets, -1, RUN)).transpose(0, 1).flatten(0, 2)
        return weight

    @property
    def is_packed(self) -> bool:
        """Return whether there are tiles or panels."""
        return self.tiles is not None or self.panels is not None

    @property
    def offset(self) -> int:
        """Return what is beside the scales, as `planes.Layout` says."""
        return 2 if self.centered else int(not self.scheme.symmetric)

    @property
    def panel_layout(self) -> PanelLayout:
        """Return what the kernels of panels are compiled for."""
        assert self.panels is not None
        _, _, sets, count, num_bits, *_ = self.panels.planes.shape
        return PanelLayout(num_bits, count, self.offset, sets)

    def rescale(self, tensor: QuantizedTensor) -> bool:
        """Take over scales and offsets of a weight with these planes, in place; False: it can't.

        So graphs and fused weights that read them have the new ones too.
        """
        new = planes_of(tensor)
        if self.tiles is None or self.centered or CENTERS in new.parts:
            return False
        if self.stored is not None and not self.tiles.scales.is_cuda:
            return False  # on a CPU these parts may be those of the checkpoint
        packed = tiles.pack_parameters(new)
        if packed.shape != self.tiles.scales.shape:
            return False
        self.tiles.scales.copy_(packed)
        if self.stored is not None:
            for name in new.parts.keys() - {"bit_planes"}:
                self.stored.parts[name].copy_(new.parts[name])
        return True

    @property
    def layout(self) -> planes.Layout:
        """Return what the tiled kernels are compiled for."""
        inputs = self.shape.in_features
        size = self.scheme.group_size or inputs
        group = size if size < inputs else -(-inputs // UNIT) * UNIT
        return planes.Layout(self.scheme.num_bits, group, self.offset)
