"""What became of a recipe: the verdict on what its steps have kept, and its files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.marks import RUN_FOLDER
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.sizes import sizes_of
from qtool.pipeline.kept_steps import KeptStep
from qtool.pipeline.model_figures import versions
from qtool.pipeline.reports import QuantizeResult
from qtool.pipeline.run_figures import (
    bench_figures,
    score_figures,
    task_failures,
    text_figures,
)
from qtool.recipe.schema import Recipe
from qtool.report.verdict import Figures, GateLine, gates_junit, gates_markdown, judge
from qtool.storage.plain_json import plain_json, write_json_file
from qtool.storage.whole_files import written_whole

READERS = {"text": text_figures, "tasks": score_figures, "bench": bench_figures}
"""What a step's result says to gates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What became of a recipe; `run.json` has it."""

    title: str
    out_dir: Path
    gates: tuple[GateLine, ...]
    figures: Figures
    """All that was measured, as gates read it."""
    seconds: Mapping[str, float]
    """Of each step, when it was made."""
    reused: tuple[str, ...]
    """Steps that an earlier run had done."""
    about: Mapping[str, str]
    """Model, device and versions."""
    failures: tuple[str, ...] = ()
    """Tasks that gave no scores, and why; a gate that reads one of them has failed as well."""

    @property
    def passed(self) -> bool:
        """Return whether no gate has failed."""
        return all(line.passed for line in self.gates)

    def markdown(self) -> str:
        """Return a summary for people, such as a job's."""
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        notes = [f"{name}: {value}" for name, value in self.about.items()]
        notes += [f"time: {times}", *(f"FAILED: {failure}" for failure in self.failures)]
        return gates_markdown(self.title, self.gates, notes)

    def junit(self) -> str:
        """Return a JUnit report."""
        return gates_junit(self.title, self.gates, sum(self.seconds.values()))

    def report(self) -> dict[str, Any]:
        """Return all of it for machines."""
        lines = [{**asdict(line), "name": line.name, "margin": line.margin} for line in self.gates]
        return {
            "title": self.title,
            "passed": self.passed,
            "gates": lines,
            "figures": dict(self.figures),
            "seconds": dict(self.seconds),
            "reused": list(self.reused),
            "about": dict(self.about),
            "failures": list(self.failures),
        }


def judged(
    title: str,
    about: Mapping[str, str],
    out_dir: Path,
    recipe: Recipe,
    made: QuantizeResult,
    found: Mapping[str, KeptStep],
) -> RunResult:
    """Return the verdict on what the steps have found, by their names."""
    seconds = {"quantize": made.seconds, **{name: step.seconds for name, step in found.items()}}
    sizes = sizes_of(CheckpointReader(out_dir))
    figures: dict[str, Any] = {
        "size": {
            "bytes": sizes.num_bytes,
            "strict_bits": sizes.strict_bits,
            "average_bits": made.average_bits,
        },
        "cost": {
            "quantize_seconds": made.seconds,
            "peak_memory_bytes": made.peak_memory_bytes,
            "seconds": sum(seconds.values()),
        },
    }
    for name, read in READERS.items():
        figures |= read(found[name].result) if name in found else {}
    budgets = found["check"].result["budgets"] if "check" in found else ()
    lines = tuple(GateLine(**line) for line in budgets)
    return RunResult(
        title=title,
        out_dir=out_dir,
        gates=lines + judge(recipe, plain_json(figures)),
        figures=figures,
        seconds=seconds,
        reused=tuple(name for name, step in found.items() if step.is_reused),
        about={**about, **versions()},
        failures=task_failures(found["tasks"].result) if "tasks" in found else (),
    )


def write_verdict(result: RunResult) -> None:
    """Write the verdict beside what it is of."""
    folder = result.out_dir / RUN_FOLDER
    folder.mkdir(exist_ok=True)
    write_json_file(folder / "run.json", result.report())
    for name, text in (("junit.xml", result.junit()), ("summary.md", result.markdown())):
        with written_whole(folder / name) as file:
            file.write((text + "\n").encode())
