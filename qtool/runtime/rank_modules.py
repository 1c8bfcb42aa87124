"""A linear of which each rank of a group has a part; its outputs are whole."""

from torch import Tensor, nn

from qtool.base import ModelPart
from qtool.runtime.tensor_parallel import TensorParallel


class SpreadLinear(nn.Module):
    """Stands in for a linear without bias; `inner` is this rank's part of it."""

    bias = None

    def __init__(
        self,
        inner: ModelPart,
        group: TensorParallel,
        rows: tuple[int, ...] = (),
        *,
        is_even: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.group = inner, group
        self.rows = rows
        """Of each rank; empty: ranks have columns."""
        self.is_even = is_even
        """All ranks have as many columns."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (..., out_features): those of ranks side by side, or their sum."""
        y = self.inner(x)
        return self.group.all_gather(y, self.rows) if self.rows else self.group.all_reduce(y)
