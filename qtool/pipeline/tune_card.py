"""`bench --tune`: a tuning table for the card that is there."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.base import Emit, ignore_events
from qtool.pipeline.model_figures import versions

if TYPE_CHECKING:
    from qtool.timing.machine import Machine
    from qtool.timing.tune import TuneResult


@dataclass(frozen=True, slots=True)
class CardTuned:
    """A table, where it lies, and what it was measured on."""

    path: Path
    result: "TuneResult"
    machine: "Machine"
    copy_gb_per_second: float
    versions: dict[str, str]


def tune_card(emit: Emit = ignore_events) -> CardTuned:
    """Measure what is fastest on this card and keep it in the cache, where `selection` finds it.

    Raises:
        BackendError: there is no card that the kernels run on.
        MissingExtraError: CuPy isn't installed.
    """
    from qtool.runtime.backends.cuda.selection import SELECTIONS, selection_for
    from qtool.runtime.backends.cuda.selection_file import write_selection
    from qtool.timing import gpu, machine
    from qtool.timing.tune import tune

    device = machine.require_card()
    bench = gpu.on_card(device, None)
    card = bench.machine()
    known = (one for one in SELECTIONS if one.measured_on == card.card)
    result = tune(bench.rig, next(known, SELECTIONS[0]), emit)
    path = write_selection(result.selection)
    selection_for.cache_clear()
    bandwidth = bench.rig.copy_bandwidth / 1e9
    return CardTuned(path, result, card, bandwidth, versions())
