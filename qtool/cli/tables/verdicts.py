"""The gates of `qtool run`, with what they were judged by."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli import console
from qtool.cli.tables.next_steps import print_next
from qtool.recipe.gates import GATE_OF

if TYPE_CHECKING:
    from qtool.pipeline import RunResult
    from qtool.recipe.schema import Recipe
    from qtool.steps.plan import Plan


def print_gates(result: "RunResult") -> None:
    """Print a row per gate, or without gates what was measured; then what they hold for."""
    from qtool.report.verdict import COLUMNS_OF_GATES, number_text

    if result.gates:
        console.print_table(result.title, COLUMNS_OF_GATES, [line.cells() for line in result.gates])
    else:
        rows = [
            (name, number_text(value))
            for name, value in _leaves(result.figures)
            if isinstance(value, int | float)
        ]
        console.print_table(result.title, ("figure", ">value"), rows)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    lines = [f"Time: {times}."]
    if result.reused:
        lines.append(f"Kept from an earlier run: {', '.join(result.reused)}.")
    failed = [line.name for line in result.gates if not line.passed]
    if failed:
        lines.append(f"Failed: {', '.join(failed)}. All results are kept in {result.out_dir}.")
    elif result.gates:
        lines.append(f"Passed: all {len(result.gates)} gates. All results are in {result.out_dir}.")
    else:
        lines.append(f"All results are in {result.out_dir}. No gate judges them.")
    console.print_lines(lines)
    print_next(("report", result.out_dir))


def print_steps(recipe: "Recipe", plan: "Plan", json_file: Path | None) -> None:
    """Print what a run would do."""
    sections = {"check": recipe.check, "eval": recipe.eval, "bench": recipe.bench}
    asked = {
        name: section.model_dump(mode="json", exclude_defaults=True)
        for name, section in sections.items()
        if section is not None
    }
    report = {
        "layers": len(plan.layers),
        "average_bits": plan.average_bits,
        "total_bytes": plan.total_bytes,
        "steps": asked,
        "gates": dict(recipe.gates),
    }
    if not console.write_json(report, json_file):
        return
    size = f"{len(plan.layers)} layers, {plan.average_bits:.2f} bits per weight"
    rows = [("quantize", size)]
    rows += [(name, ", ".join(f"{k}={v}" for k, v in one.items())) for name, one in asked.items()]
    console.print_table("Steps", ("step", "what"), rows)
    gates = [
        (
            name,
            "at least" if GATE_OF[name].at_least else "at most",
            str(limit),
            GATE_OF[name].summary,
        )
        for name, limit in recipe.gates.items()
    ]
    if gates:
        console.print_table("Gates", ("gate", "", ">limit", "of"), gates)
    console.print_lines(["Nothing was written."])


def _leaves(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    from qtool.storage.plain_json import leaves

    return leaves(figures)
