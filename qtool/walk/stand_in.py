"""Modules in the place of blocks that aren't to run."""

from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Stands in for a block, whose attributes it has: models look at its kind of attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # a tuple: not a submodule

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Answer for the block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)


class Stop(Exception):  # noqa: N818
    """Ends a forward pass when what was wanted has been seen."""


def as_output(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:  # noqa: ANN401
    """Return hidden states as a block does, with what follows them; None: it returns no tuple."""
    return hidden if rest is None else (hidden, *rest)
