"""Weights whose rows have bits of their own, as a run makes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats.mixed_rows import encode_mixed
from qtool.scheme import WeightScheme
from qtool.steps.plan import load_method
from tests.helpers import problem


def solved_mixed(
    weight: Tensor, row_bits: Sequence[int], group_size: int | None, *, symmetric: bool = False
) -> QuantizedTensor:
    """Solve each class of rows by itself, without data, and join them."""
    method, bits, classes = load_method("bcq"), torch.tensor(row_bits, dtype=torch.uint8), []
    options = method.options(rounds=1, scales="coded")
    for num_bits in sorted(set(row_bits), reverse=True):
        scheme = WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
        classes.append(method.solve(problem(weight[bits == num_bits], scheme), options).tensor)
    return encode_mixed(classes, bits)
