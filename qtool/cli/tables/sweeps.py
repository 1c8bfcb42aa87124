"""The table of `quantize --sweep`: all sizes, the smallest first."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.cli.tables.next_steps import print_next
from qtool.errors import MethodError
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.pipeline import SweepResult

_COLUMNS = ["size", ">bits of blocks", ">strict bits", ">on disk", ">KL", ">KL, chats"]
_COLUMNS += [">perplexity", "front"]


def print_sweep(result: "SweepResult", json_file: Path | None) -> None:
    """Print one row per size.

    Raises:
        MethodError: a size failed; the others are there.
    """
    if console.write_json(asdict(result), json_file):
        rows = [
            (
                size.name,
                f"{size.block_bits:.3f}",
                f"{size.strict_bits:.3f}",
                gigabytes(size.disk_bytes),
                f"{size.kl_text:.4f}",
                "" if size.kl_chats is None else f"{size.kl_chats:.4f}",
                f"{size.perplexity:.3f}",
                "*" if size.on_front else "",
            )
            for size in result.sizes
        ]
        console.print_table(str(result.out_dir), _COLUMNS, rows)
        console.print_lines(
            ["KL: nats per token, to the original. *: nothing smaller is as close on the text."]
        )
        print_next(("report", result.out_dir))
    if result.failures:
        name, reason = next(iter(result.failures.items()))
        raise MethodError(
            f"{len(result.failures)} sizes failed, the first {name}: {reason} The others are in "
            f"{result.out_dir}; the same command with --resume tries these again."
        )
