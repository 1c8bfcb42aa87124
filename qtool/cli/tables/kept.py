"""The table of what isn't quantized, and why."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtool.cli import console

if TYPE_CHECKING:
    from collections.abc import Callable


def print_kept(reasons: Mapping[str, str], size: "Callable[[str], str] | None" = None) -> None:
    """Print a line for each kind of weight that is stored as it was; nothing if there is none.

    Args:
        reasons: Names of tensors with the reason why each isn't quantized.
        size: Gives what a kind's first tensor is like; None: that isn't said.
    """
    from qtool.checkpoint.kept_kinds import kept_kinds

    rows = [
        (one.kind, str(len(one.names)), *(() if size is None else (size(one.names[0]),)), one.why)
        for one in kept_kinds(reasons)
    ]
    columns = ("weights", ">tensors", *(() if size is None else (">each",)), "why")
    if rows:
        console.print_table("Not quantized", columns, rows)
