"""The table of `run --dry-run=cluster`: what a run would take on many machines."""

from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.cli.progress import clock
from qtool.errors import BackendError
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.steps.cluster import Forecast


def print_forecast(found: "Forecast", json_file: Path | None) -> None:
    """Print what a run would take of each node.

    Raises:
        BackendError: it won't fit.
    """
    if console.write_json(found.to_json(), json_file):
        rows = [
            (
                phase.name,
                clock(phase.seconds),
                gigabytes(size) if (size := phase.network_bytes) else "",
            )
            for phase in found.phases
        ]
        columns = ("phase", ">time", ">over the network")
        console.print_table("On paper (nothing was written)", columns, rows)
        console.print_lines(_lines(found))
    short = [shortage.sentence() for shortage in found.shortages()]
    if short:
        raise BackendError("It won't fit. " + " ".join(short))


def _lines(found: "Forecast") -> list[str]:
    there = found.cluster
    card = found.worker_card_bytes
    on_card = f", {gigabytes(card)} of its card" if card else ""
    return [
        f"Nodes: {there.nodes}, workers: {there.workers}. About {clock(found.seconds)}; with one "
        f"worker {clock(found.one_worker)}.",
        f"A worker takes {gigabytes(found.worker_bytes)} of memory{on_card}; the command "
        f"{gigabytes(found.driver_bytes)}; its node, with {there.crowd} workers, "
        f"{gigabytes(found.node_bytes)} of {gigabytes(there.memory_bytes)}.",
    ]
