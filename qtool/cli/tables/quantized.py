"""The table that `quantize` ends with."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli import console
from qtool.cli.tables.kept import print_kept
from qtool.cli.tables.next_steps import print_next_of_checkpoint
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtool.pipeline import QuantizeResult
    from qtool.steps.solve import LayerResult


def print_quantized(result: "QuantizeResult", original: str, json_file: Path | None) -> None:
    """Print what a finished run reports, and how what was made of the original is used."""
    report = asdict(result)
    if not result.budgets:
        del report["budgets"]
    if not console.write_json(report, json_file):
        return
    rows = [
        ("layers", str(len(result.layers))),
        ("bits per weight, with scales", f"{result.average_bits:.2f}"),
        (
            "size",
            f"{gigabytes(result.weight_bytes)} "
            f"({result.weight_bytes / result.source_bytes:.0%} of the original)",
        ),
        *_choosing_rows(result),
        *_search_rows(result),
        *_error_rows(result),
        *_expert_rows(result),
        *(
            (f"tuned {what}", f"{was:.3g} -> {now:.3g}")
            for what, (was, now) in result.tuning.items()
        ),
        *_check_rows(result),
        *((line.name, ", ".join(line.cells()[1:])) for line in result.budgets),
        ("time", f"{result.seconds:.1f} s on {result.device}"),
        ("peak memory", gigabytes(result.peak_memory_bytes)),
    ]
    fallbacks = sum(layer.fallback is not None for layer in result.layers)
    if fallbacks:
        rows.append(("solved more simply than asked", f"{fallbacks} layers, see the report"))
    console.print_table(str(result.out_dir), ("", "value"), rows)
    print_kept(result.unquantized)
    print_next_of_checkpoint(result.out_dir, original)


def _choosing_rows(result: "QuantizeResult") -> list[tuple[str, str]]:
    """Return what was chosen, if anything was."""
    found = result.choosing
    if not found:
        return []
    bits = f"{found['average_bits']:.3f}, of the {found['average_bits_asked']:g} that may be"
    return [
        ("bits chosen, on average", bits),
        ("KL foretold, without calibration", f"{found['divergence']:.3g} nats per token"),
    ]


def _search_rows(result: "QuantizeResult") -> list[tuple[str, str]]:
    """Return what was searched, if anything was."""
    found = result.search
    if not found:
        return []
    losses = f"{found['start']:.4f} -> {found['end']:.4f} nats per token on held-out samples"
    effort = (
        f"{len(found['found'])} numbers changed, by {found['evaluations']} losses of the model "
        f"and {found['block_evaluations']} errors of blocks, in {found['seconds']:.0f} s"
    )
    return [("KL that the search began and ended with", losses), ("searched", effort)]


def _error_rows(result: "QuantizeResult") -> list[tuple[str, str]]:
    """Return the errors of the outputs where they were measured, else those of the weights."""
    measured = [layer for layer in result.layers if "added_error" in layer.metrics]
    key, what = "added_error", "error added to the outputs"
    if not measured:
        measured, key, what = list(result.layers), "nmse", "error of the weights (NMSE)"
    worst = max(measured, key=lambda layer: layer.metrics[key])
    value = f"{_mean(measured, key):.2e} on average"
    if key == "added_error":
        value += f"; rounding to nearest adds {_mean(measured, 'added_error_rounded'):.2e}"
    return [(what, value), ("worst layer", f"{worst.name}, {worst.metrics[key]:.2e}")]


def _expert_rows(result: "QuantizeResult") -> list[tuple[str, str]]:
    """Return how many calibration tokens experts got, if there are any."""
    counts = [count for part in result.experts.values() for count in part["tokens"]]
    if not counts:
        return []
    starved = sum(len(part["starved"]) for part in result.experts.values())
    said = f"{sorted(counts)[len(counts) // 2]} (median), {min(counts)} to {max(counts)}"
    return [
        ("calibration tokens of an expert", said),
        ("layers with fewer than inputs", f"{starved}, see the report"),
    ]


def _check_rows(result: "QuantizeResult") -> list[tuple[str, str]]:
    """Return how closely the result follows its original, if it was compared."""
    check = result.check
    if check is None:
        return []
    measured = (("text", check.text), ("chats", check.chats))
    rows = [
        (
            f"KL divergence on {what}",
            f"{found.kl_divergence:.4f} nats per token; same likeliest token "
            f"{100 * found.top1_agreement:.1f} %",
        )
        for what, found in measured
        if found is not None
    ]
    missing = [("KL divergence on chats", f"none: {check.no_chats}")] if check.no_chats else []
    return rows + missing


def _mean(layers: "Sequence[LayerResult]", key: str) -> float:
    return sum(layer.metrics[key] for layer in layers) / len(layers)
