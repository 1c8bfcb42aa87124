"""The table of `qtool bench --tune`."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtool.cli import console
from qtool.cli.tables.kernels import card_line

if TYPE_CHECKING:
    from qtool.pipeline import CardTuned


def print_tuned(tuned: "CardTuned") -> None:
    """Print what was timed, and what is chosen from now on."""
    rows = []
    for trial, microseconds in tuned.result.trials:
        tuning, what = trial.tuning, trial.kernel
        if tuning is not None:
            what += f", {tuning.per_multiprocessor} x {tuning.warps} warps, {tuning.stages} stages"
        shape = f"{trial.shape.out_features} x {trial.shape.in_features}"
        time = f"{microseconds:.1f}" if math.isfinite(microseconds) else "can't run"
        rows.append((shape, str(trial.num_bits), str(trial.tokens), what, time))
    columns = ("out x in", ">bits", ">tokens", "kernel", ">us")
    console.print_table("Timed for the tuning table", columns, rows)
    console.print_lines(
        [
            f"{card_line(tuned.machine)}. Copy of 1 GiB: {tuned.copy_gb_per_second:,.0f} GB/s.",
            f"From now on: {tuned.result.selection}.",
            f"Written to {tuned.path}; without that file, what comes with qtool is used.",
        ]
    )


def tuned_report(tuned: "CardTuned") -> dict[str, Any]:
    """Return the JSON form."""
    from qtool.runtime.backends.cuda.selection_file import as_numbers

    trials = [
        {
            "shape": list(trial.shape),
            "num_bits": trial.num_bits,
            "tokens": trial.tokens,
            "kernel": trial.kernel,
            "tuning": trial.tuning and asdict(trial.tuning),
            "microseconds": microseconds,
        }
        for trial, microseconds in tuned.result.trials
    ]
    return {
        "path": str(tuned.path),
        "selection": as_numbers(tuned.result.selection),
        "trials": trials,
        "machine": asdict(tuned.machine),
        "copy_gb_per_second": tuned.copy_gb_per_second,
        "versions": tuned.versions,
    }
