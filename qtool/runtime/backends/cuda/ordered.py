"""Weights whose inputs are placed anew: sorted by group, or groups padded to what kernels take."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qtool.base import QuantizedTensor
from qtool.core.packing import pack_bits, unpack_bits
from qtool.formats.ordered_affine import ORDERED_AFFINE, split_order
from qtool.runtime.backends.cuda import mixed
from qtool.runtime.backends.cuda.centers import padded_group, planes_of
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import KernelCall, Launch, constants
from qtool.runtime.backends.cuda.mixed import MixedWeight

PLACE_THREADS = 256


@dataclass(frozen=True, slots=True)
class OrderedWeight:
    """A weight of format `ordered_affine` or of padded groups, ready for the kernels."""

    weight: KernelWeight | MixedWeight
    """Of columns as they are placed."""
    order: Tensor
    """(columns,) int64, which input each column has; in_features: none, it is padding."""
    in_features: int

    def sorted(self, x: Tensor) -> Tensor:
        """Return inputs (..., in_features) in the order of the columns; zeros for padding."""
        if len(self.order) > self.in_features:
            x = functional.pad(x, (0, 1))
        return x.index_select(-1, self.order)

    def placed(self, x: Tensor, launch: Launch) -> Tensor:
        """Return what `sorted` does, of (tokens, in_features) in 16 bit, by one launch."""
        (tokens, inputs), columns = x.shape, len(self.order)
        y = x.new_empty(tokens, columns)
        if tokens > 0:
            grid = (-(-columns // PLACE_THREADS), tokens, 1)
            numbers, macros = (inputs, columns), constants(torch.float16)
            call = KernelCall(
                "place_inputs", "place_inputs", macros, grid, PLACE_THREADS, 0, numbers
            )
            launch(call, (x.contiguous(), self.order, y))
        return y

    def in_place(self, rows: Tensor) -> Tensor:
        """Return rows (..., columns) of the weight in the order of the inputs."""
        return rows.index_select(-1, self.order.argsort()[: self.in_features])

    def dense(self) -> Tensor:
        """Return W by the definition of its format: (out_features, in_features)."""
        return self.in_place(self.weight.dense())


def prepare_any(
    tensor: QuantizedTensor, dtype: torch.dtype
) -> KernelWeight | MixedWeight | OrderedWeight:
    """Re-lay a weight of any format that the kernels run, on the device that runs it."""
    ordered, inputs = tensor.format == ORDERED_AFFINE, tensor.shape.in_features
    plain, order = split_order(tensor) if ordered else (tensor, None)
    size = padded_group(plain)
    if size is not None:
        plain, places = pad_groups(planes_of(plain), size)
        order = places if order is None else functional.pad(order, (0, 1), value=inputs)[places]
    weight = mixed.prepare_weight(plain, dtype)
    return weight if order is None else OrderedWeight(weight, order, inputs)


def pad_groups(planes: QuantizedTensor, size: int) -> tuple[QuantizedTensor, Tensor]:
    """Return a weight of planes with groups of `size` inputs, and which input each column has."""
    inputs, group = planes.shape.in_features, planes.scheme.group_size
    assert group is not None
    words = planes.parts["bit_planes"]
    whole, more = (0, -inputs % group), (0, size - group)
    places = functional.pad(torch.arange(inputs, device=words.device), whole, value=inputs)
    places = functional.pad(places.view(-1, group), more, value=inputs).flatten()
    padded = []
    for plane in words:  # one at a time: a bit is a byte here
        bits = functional.pad(unpack_bits(plane, inputs), whole).unflatten(-1, (-1, group))
        padded.append(pack_bits(functional.pad(bits, more).flatten(-2)))
    return (
        replace(
            planes,
            scheme=replace(planes.scheme, group_size=size),
            shape=planes.shape._replace(in_features=len(places)),
            parts={**planes.parts, "bit_planes": torch.stack(padded)},
        ),
        places,
    )
