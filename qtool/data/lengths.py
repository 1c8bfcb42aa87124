"""Sequence-length matching (SLAC): calibration samples as long as the prompts of the target tasks.

Source: Lee et al. 2023 (AQAS and SLAC, arXiv 2311.05161): activation ranges depend on the length
of the sequence, so calibrating at another length than the task's fits the wrong ranges.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtool import resources
from qtool.base import Tokenizer
from qtool.errors import DataError
from qtool.plugins import describe_miss
from qtool.storage.jsonl import json_objects, read_text

SHORTEST_SAMPLE = 8
"""Shorter samples hold too little context to be worth a forward pass."""
MOST_DIGITS = 9
"""Of a length: no model has a billion positions."""


def known_tasks() -> tuple[str, ...]:
    """Return the tasks whose prompts are bundled."""
    names = (path.name.removesuffix(".jsonl.xz") for path in resources.prompts_dir().iterdir())
    return tuple(sorted(names))


def check_known(tasks: Sequence[str]) -> None:
    """Refuse tasks whose prompts aren't bundled.

    Raises:
        DataError: there is one; the message has those that are.
    """
    for task in tasks:
        if task not in known_tasks():
            raise DataError(
                describe_miss(task, known_tasks(), "tasks with bundled prompts")
                + " Give the lengths of other tasks with --lengths FILE."
            )


def task_lengths(tokenizer: Tokenizer, tasks: Sequence[str]) -> list[int]:
    """Return the lengths in tokens of the bundled prompts of some tasks.

    Raises:
        DataError: a task's prompts aren't bundled.
    """
    check_known(tasks)
    lengths: list[int] = []
    for task in tasks:
        rows = json_objects(resources.prompts_dir() / f"{task}.jsonl.xz")
        lengths += [len(tokenizer(row["prompt"], verbose=False)["input_ids"]) for row in rows]
    return lengths


def read_lengths(path: Path) -> list[int]:
    """Return lengths from a file with one whole number per line.

    Raises:
        DataError: the file is missing, empty, or holds anything else.
    """
    lengths = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        for word in line.split():
            if not (word.isdecimal() and len(word) <= MOST_DIGITS and int(word)):
                raise DataError(
                    f"{path} line {number} has {word[:40]!r}. The file must hold one whole number "
                    f"per line, from 1 to {10**MOST_DIGITS - 1}."
                )
            lengths.append(int(word))
    if not lengths:
        raise DataError(f"{path} is empty. It must hold one whole number per line.")
    return lengths


def match_lengths(wanted: Sequence[int], *, num_tokens: int, longest: int, seed: int) -> list[int]:
    """Draw sample lengths that are distributed like `wanted` and use a budget of tokens.

    Evenly spaced quantiles, so that even a few samples have the right distribution; the order is
    shuffled, so that the held-out samples have it too.

    Args:
        wanted: Lengths to match.
        num_tokens: About how many tokens all samples hold: the budget doesn't depend on the
            lengths, so that a Hessian always sees as many tokens.
        longest: Longer ones are cut to this.
        seed: Of the order.
    """
    ordered = sorted(min(max(length, SHORTEST_SAMPLE), longest) for length in wanted)
    count = max(2, round(num_tokens * len(ordered) / sum(ordered)))
    lengths = [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def histogram(lengths: Sequence[int], edges: Sequence[int]) -> list[float]:
    """Return the share of lengths in each interval [edges[i], edges[i + 1])."""
    pairs = itertools.pairwise(edges)
    return [sum(low <= x < high for x in lengths) / len(lengths) for low, high in pairs]


def bin_edges(lengths: Sequence[int], count: int = 10) -> list[int]:
    """Return boundaries of about `count` equal intervals that hold all lengths."""
    low, high = min(lengths), max(lengths) + 1
    step = max(1, -(-(high - low) // count))
    return [*range(low, high, step), low + step * (-(-(high - low) // step))]


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Return the 10th, 50th and 90th percentile; each is one of the lengths."""
    ordered = sorted(lengths)
    low, middle, high = (ordered[int(part * len(ordered))] for part in (0.1, 0.5, 0.9))
    return low, middle, high


def summary(lengths: Sequence[int], edges: Sequence[int]) -> dict[str, Any]:
    """Return a histogram and its quantiles, JSON-able; `edges` bound the intervals."""
    p10, median, p90 = quantiles(lengths)
    shares = histogram(lengths, edges)
    return {"median": median, "p10": p10, "p90": p90, "edges": list(edges), "shares": shares}
