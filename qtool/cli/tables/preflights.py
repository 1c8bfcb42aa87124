"""The table of `quantize --dry-run=measure`: what each phase would take."""

from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.cli.progress import clock
from qtool.errors import BackendError
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.steps.preflight import Phase, Preflight


def print_preflight(found: "Preflight", json_file: Path | None) -> None:
    """Print what a run would take, and what is left of the machine.

    Raises:
        BackendError: a phase won't fit.
    """
    short = [shortage.sentence() for shortage in found.shortages()]
    if console.write_json(found.to_json(), json_file):
        columns = ("phase", ">time", ">CPU time", ">memory", ">card", ">disk", "how it is known")
        rows = [_cells(phase) for phase in found.phases]
        console.print_table("Preflight (nothing was written)", columns, rows)
        console.print_lines([_total(found), _margins(found)])
    if short:
        raise BackendError("It won't fit. " + " ".join(short))


def _cells(phase: "Phase") -> tuple[str, ...]:
    usage = phase.usage
    if usage is None:
        return (phase.name, "?", "?", "?", "", "", phase.how)
    return (
        phase.name,
        clock(usage.seconds),
        clock(usage.cpu_seconds),
        gigabytes(usage.memory_bytes) if usage.memory_bytes else "",
        gigabytes(usage.card_bytes) if usage.card_bytes else "",
        gigabytes(phase.disk_bytes) if phase.disk_bytes else "",
        phase.how,
    )


def _total(found: "Preflight") -> str:
    total = found.total
    more = "" if found.is_whole else ", and what wasn't measured on top"
    return (
        f"In all about {clock(total.seconds)} ({clock(total.cpu_seconds)} of CPU time){more}; at "
        "most:"
    )


def _margins(found: "Preflight") -> str:
    """Say how much of everything is needed, and what is left of what there is."""
    total, there = found.total, found.there()
    needs = {
        "memory": total.memory_bytes,
        "card": total.card_bytes,
        "disk": found.disk_bytes,
    }
    return (
        "; ".join(
            f"{gigabytes(needed)} of {gigabytes(there[what])} {what}, "
            f"{(there[what] - needed) / max(there[what], 1):.0%} left"
            for what, needed in needs.items()
            if needed
        )
        + "."
    )
