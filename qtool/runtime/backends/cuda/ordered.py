"""Weights whose inputs are sorted by group: an affine one, and what sorts the inputs before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats.ordered_affine import ORDERED_AFFINE, split_order
from qtool.runtime.backends.cuda import mixed
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.mixed import MixedWeight


@dataclass(frozen=True, slots=True)
class OrderedWeight:
    """A weight of format `ordered_affine`, ready for the kernels."""

    weight: KernelWeight | MixedWeight
    """Of sorted columns."""
    order: Tensor
    """(in_features,) int64, which input each column has."""

    def sorted(self, x: Tensor) -> Tensor:
        """Return inputs (..., in_features) in the order of the columns."""
        return x.index_select(-1, self.order)

    def dense(self) -> Tensor:
        """Return W by the definition of its format: (out_features, in_features)."""
        return self.weight.dense()[:, self.order.argsort()]


def prepare_any(
    tensor: QuantizedTensor, dtype: torch.dtype
) -> KernelWeight | MixedWeight | OrderedWeight:
    """Re-lay a weight of any format that the kernels run, on the device that runs it."""
    if tensor.format != ORDERED_AFFINE:
        return mixed.prepare_weight(tensor, dtype)
    plain, order = split_order(tensor)
    return OrderedWeight(mixed.prepare_weight(plain, dtype), order)
