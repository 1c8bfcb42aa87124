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
PATIENCE = 4
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
        **_settings: Any,  # noqa: ANN401
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run every candidate with its test.

        Args:
            references: One test program per task.
            predictions: Candidate programs per task.
            k: Which pass@k to return; those with k above the number of candidates are left out.
            timeout: Seconds of processor time of one program.

        Returns:
            pass@k by name, and per task the outcome of each candidate.
        """
        programs = [
            f"{candidate}\n{test}"
            for test, candidates in zip(references, predictions, strict=True)
            for candidate in candidates
        ]
        outcomes = iter(
            run_programs(
                programs, Limits(seconds=PATIENCE * timeout, cpu_seconds=math.ceil(timeout))
            )
        )
        recorded = _recorded.get()
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, candidates in enumerate(predictions):
            results[task] = []
            for number, candidate in enumerate(candidates):
                outcome = next(outcomes)
                if recorded is not None:
                    recorded[candidate, references[task]] = outcome
                passed = outcome.status == "passed"
                result = {"task_id": task, "passed": passed, "result": outcome.detail}
                results[task].append((number, {**result, "completion_id": number}))
        counts = [(len(r), sum(one["passed"] for _, one in r)) for r in results.values()]
        scores = {
            f"pass@{n}": sum(pass_at_k(total, right, n) for total, right in counts) / len(counts)
            for n in k
            if all(total >= n for total, _ in counts)
        }
        return scores, results
