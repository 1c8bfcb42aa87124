"""Weights whose rows have bits of their own: one of planes per class, and where its rows belong.

All classes are multiplied in one launch where the kernels can (`classes`), else each by itself; the
kernels write the outputs of their rows to their places: no launch that sorts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats import mixed_rows
from qtool.runtime.backends.cuda import linear_kernels
from qtool.runtime.backends.cuda.classes import by_classes
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import LOAD_BYTES, Card, Launch
from qtool.runtime.backends.cuda.planes import Target
from qtool.runtime.backends.cuda.selection import BLOCK, wanted_kernel
from qtool.scheme import Shape2D, WeightScheme


@dataclass(frozen=True, slots=True)
class MixedWeight:
    """A weight of format `mixed_rows`, ready for the kernels."""

    scheme: WeightScheme
    shape: Shape2D
    classes: tuple[KernelWeight, ...]
    """By descending width."""
    places: tuple[Tensor, ...]
    """Of each class, (its rows,) int32: which rows of the whole they are."""
    numbers: Tensor  # (out_features,) int32: where the rows are in the classes, stacked

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the activations."""
        return self.classes[0].dtype

    @property
    def is_tiled(self) -> bool:
        """Return whether the tiled kernels run all classes."""
        return all(part.tiles is not None for part in self.classes)

    def dense(self) -> Tensor:
        """Return W by the definition of its format, in torch: (out_features, in_features)."""
        return torch.cat([part.dense() for part in self.classes])[self.numbers]


def prepare_weight(
    tensor: QuantizedTensor, dtype: torch.dtype, *, keep_stored: bool | None = None
) -> KernelWeight | MixedWeight:
    """Re-lay a weight of any format that the kernels run, on the device that runs it.

    Stored parts of classes of rows are kept only for a kernel that is asked for: tables would write
    where no class belongs. The arguments are those of `linear_kernels.prepare`.
    """
    if tensor.format != mixed_rows.MIXED_ROWS:
        return linear_kernels.prepare(tensor, dtype, keep_stored=keep_stored)
    classes, numbers = mixed_rows.split_rows(tensor)
    keep = keep_stored if keep_stored is not None or wanted_kernel() else False
    parts = [linear_kernels.prepare(part, dtype, keep_stored=keep) for part in classes]
    return joined_classes(parts, numbers)


def joined_classes(classes: Sequence[KernelWeight], numbers: Tensor) -> MixedWeight:
    """Return weights as one whose rows have bits of their own.

    Args:
        classes: By descending width.
        numbers: (out_features,) int64, the place of each row in the classes one below the other;
            the rows of a class keep their order.
    """
    rows = tuple((part.scheme.num_bits, part.shape.out_features) for part in classes)
    return MixedWeight(
        scheme=replace(classes[0].scheme, rows=rows),
        shape=classes[0].shape._replace(out_features=len(numbers)),
        classes=tuple(classes),
        places=numbers.argsort().to(torch.int32).split([count for _, count in rows]),
        numbers=numbers.to(torch.int32),
    )


def kernels_for(weight: KernelWeight | MixedWeight, tokens: int, card: Card) -> str:
    """Return the names of the kernels that multiply so many tokens, each once."""
    parts = weight.classes if isinstance(weight, MixedWeight) else (weight,)
    choose = linear_kernels.kernel_for if len(parts) == 1 else _kernel_of_class
    return ", ".join(dict.fromkeys(choose(part, tokens, card) for part in parts))


def _kernel_of_class(part: KernelWeight, tokens: int, card: Card) -> str:
    """Return the kernel of one of several: up to a block of tokens the planes run all at once."""
    chosen = linear_kernels.kernel_for(part, tokens, card)
    return "planes" if chosen == "wide" and tokens <= BLOCK and not wanted_kernel() else chosen


def multiply_mixed(
    x: Tensor, weight: MixedWeight, launch: Launch, card: Card, *, kernel: str | None = None
) -> Tensor:
    """Return x @ W.T.

    Args:
        x: (tokens, in_features) float16 or bfloat16, contiguous.
        weight: W.
        launch: Runs a kernel.
        card: Where.
        kernel: One of KERNELS; None: for each class the one that `kernel_for` chooses.

    Returns:
        (tokens, out_features) in the dtype of `x`.

    Raises:
        BackendError: the kernel asked for can't run a class.
    """
    y = x.new_empty(len(x), weight.shape.out_features)
    if x.data_ptr() % LOAD_BYTES != 0:
        x = x.clone()
    by_tiles = []
    for part, places in zip(weight.classes, weight.places, strict=True):
        chosen = kernel or _kernel_of_class(part, len(x), card)
        if chosen == "planes" and part.tiles is not None and len(x) > 0:
            by_tiles.append((part, places))
        elif chosen == "wide" and len(x) > 0:
            linear_kernels.by_wide(x, part, launch, card, target=Target(y, places))
        else:
            product = linear_kernels.matmul(x, part, launch, card, kernel=chosen)
            y.index_copy_(1, places.long(), product)
    by_classes(x, by_tiles, y, launch, card)
    return y


def gather_mixed(index: Tensor, weight: MixedWeight, launch: Launch) -> Tensor:
    """Return the rows that `index` names: (*index.shape, in_features); NaN where there is none."""
    inputs = weight.shape.in_features
    found = torch.empty(*index.shape, inputs, dtype=weight.dtype, device=index.device)
    if not weight.is_tiled:
        return weight.dense()[index]
    if index.numel() == 0:
        return found
    flat = index.flatten().to(torch.int64).contiguous()
    begins = accumulate((len(places) for places in weight.places), initial=0)
    for part, begin in zip(weight.classes, begins, strict=False):
        packed = part.tiles
        assert packed is not None
        units, groups = packed.planes.shape[1], packed.scales.shape[1]
        sizes = (part.shape.out_features, inputs, units, groups, begin, weight.shape.out_features)
        call = linear_kernels.dequantize_call(
            "gather_rows", sizes, len(flat), part.layout, part.dtype
        )
        launch(call, (packed.planes, packed.scales, flat, weight.numbers, found))
    return found
