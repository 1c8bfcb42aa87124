"""Results read back: equal to the bit, or an error that names the tensor."""

from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import CheckpointError
from qtool.wording import shown

OWN_READER = "qtool's own reader"


def check_equal(where: Path, name: str, found: Tensor, expected: Tensor) -> None:
    """Compare two tensors bit by bit.

    Raises:
        CheckpointError: they differ in shape, dtype or any value.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise CheckpointError(
            f"{where}: {shown(name)} reads back as {found.dtype} {tuple(found.shape)}; "
            f"{expected.dtype} {tuple(expected.shape)} was written. Export it again, and report "
            "this if it happens again."
        )
    if not torch.equal(found, expected):
        count = int((found != expected).sum())
        raise CheckpointError(
            f"{where}: {count} of {found.numel()} values of {shown(name)} read back otherwise than "
            "they were written. Export it again, and report this if it happens again."
        )
