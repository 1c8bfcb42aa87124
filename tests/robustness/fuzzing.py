"""Try many inputs; list one small input per kind of failure."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

MORE = 40
"""How many times as many inputs `make fuzz` tries."""


@dataclass(frozen=True, slots=True)
class Change:
    """A good directory with some files changed."""

    what: str
    """What was done to it, shortly."""
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    """New contents by relative path; None: the file is gone."""
    keeps_values: bool = True
    """Whether a reader that takes it must find what was there before."""

    def __repr__(self) -> str:
        return self.what if len(self.what) <= 200 else f"{self.what[:200]}..."

    def applied(self, good: Path, target: Path) -> Path:
        """Return `target`, made a copy of `good` with the changes."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(good, target, copy_function=shutil.copyfile)
        for name, content in self.files.items():
            file = target / name
            file.unlink(missing_ok=True)
            if content is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        return target


def sizes(count: int) -> pytest.MarkDecorator:
    """Run a test with `size` = `count`, and behind the mark `fuzz` with more inputs."""
    more = pytest.param(MORE * count, marks=pytest.mark.fuzz, id="more")
    return pytest.mark.parametrize("size", [pytest.param(count, id="few"), more])


def fuzz(inputs: SearchStrategy[Any], check: Callable[[Any], str | None], size: int) -> None:
    """Check `size` inputs.

    Args:
        inputs: What to draw from.
        check: Returns what is wrong, None if nothing is.
        size: How many inputs.

    Raises:
        AssertionError: inputs failed; of each kind of failure the shortest is listed.
    """
    failures: dict[str, tuple[int, str, str]] = {}

    @settings(
        max_examples=size,
        phases=[Phase.generate],  # one process per input: shrinking would take minutes
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value: Any) -> None:
        complaint = check(value)
        if complaint is None:
            return
        kind = re.sub(r"'[^']*'|\d+|/\S+", "_", complaint)[:100]
        count, _, shortest = failures.get(kind, (0, "", repr(value)))
        shortest = min(shortest, repr(value), key=len)
        failures[kind] = (count + 1, complaint, shortest)

    run()
    lines = [f"{n} x {text}\n      {value[:400]}" for n, text, value in failures.values()]
    assert not failures, f"{len(failures)} kinds of failure:\n" + "\n".join(sorted(lines))
