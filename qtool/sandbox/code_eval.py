"""pass@k of programs that a model wrote, each run in the sandbox.

Stands in for `code_eval` of the library evaluate (Chen et al. 2021, arXiv 2107.03374), which
lm-eval's code tasks use: the same arguments and the same results.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from qtool.sandbox.run import Limits, Outcome, run_programs

SECONDS = 3.0
"""Of one program, as in `code_eval`; here of its processor time, so that a busy machine fails no
program that is right."""
WALL_CLOCK = 4
"""Wall-clock time in multiples of that."""

Recorded = dict[tuple[str, str], Outcome]
_recorded: ContextVar[Recorded | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recorded_outcomes() -> Iterator[Recorded]:
    """Record what becomes of programs inside the block, by (program, test).

    lm-eval's tasks throw away all of it but pass@k.
    """
    found: Recorded = {}
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that one of k of `samples` programs is right, without bias."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class CodeEval:
    """What `evaluate.load("code_eval")` returns."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        timeout: float = SECONDS,
        **_settings: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run every candidate with its test: one test program and some candidates per task.

        Returns pass@k by name, for each `k` up to the number of candidates, and per task the
        outcome of each candidate; `timeout` is in seconds of processor time of one program.
        """
        tasks = list(zip(references, predictions, strict=True))
        programs = [f"{one}\n{test}" for test, candidates in tasks for one in candidates]
        limits = Limits(seconds=WALL_CLOCK * timeout, cpu_seconds=math.ceil(timeout))
        outcomes = iter(run_programs(programs, limits))
        recorded, results, counts = _recorded.get(), {}, []
        for number, (test, candidates) in enumerate(tasks):
            ended = [next(outcomes) for _ in candidates]
            if recorded is not None:
                recorded.update(zip(((one, test) for one in candidates), ended, strict=True))
            passed = [end.status == "passed" for end in ended]
            counts.append((len(passed), sum(passed)))
            results[number] = [
                (i, {"task_id": number, "passed": ok, "result": end.detail, "completion_id": i})
                for i, (ok, end) in enumerate(zip(passed, ended, strict=True))
            ]
        scores = {
            f"pass@{n}": sum(pass_at_k(*count, n) for count in counts) / len(counts)
            for n in k
            if all(total >= n for total, _ in counts)
        }
        return scores, results
