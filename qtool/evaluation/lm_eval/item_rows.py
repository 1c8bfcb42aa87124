"""What was asked and answered, item by item: one JSON object per item of a task and model.

The rows of two models join by (requested, task, item): both were asked the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qtool.sandbox.run import Outcome
from qtool.storage.jsonl import Row
from qtool.storage.plain_json import leaves, plain_json

Outcomes = Mapping[tuple[str, str], Outcome]
"""What became of programs, by (program, test)."""
AddRows = Callable[[str, Iterable[Row]], None]
"""Takes the name of a requested task and its rows: two groups may have a task in common."""


def item_rows(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], outcomes: Outcomes
) -> Iterator[Row]:
    """Yield one row per item, in the order of the data.

    `samples` are by task what lm-eval's `evaluate` returns: one per item and filter.
    """
    for task, found in samples.items():
        by_item: dict[int, list[Mapping[str, Any]]] = {}
        for sample in found:
            by_item.setdefault(sample["doc_id"], []).append(sample)
        for item in sorted(by_item):
            yield plain_json({"task": task, "item": item, **_row(by_item[item], outcomes)})


def _row(filtered: Sequence[Mapping[str, Any]], outcomes: Outcomes) -> Row:
    """Return the row of an item, of its samples, one per filter."""
    first = filtered[0]
    requests = [tuple(one) for one in first["arguments"]]
    continuations = [one[1] for one in requests if len(one) > 1 and isinstance(one[1], str)]
    programs = [
        {"filter": one["filter"], "status": outcome.status, "detail": outcome.detail}
        for one in filtered
        for _, program in leaves(one["filtered_resps"])
        if isinstance(program, str)
        and (outcome := outcomes.get((program, str(first["target"])))) is not None
    ]
    return {
        "prompts": [str(one[0]) for one in requests],
        **({"continuations": continuations} if continuations else {}),
        "answers": first["resps"],
        "filtered": {one["filter"]: one["filtered_resps"] for one in filtered},
        "target": first["target"],
        "metrics": {f"{m},{one['filter']}": one[m] for one in filtered for m in one["metrics"]},
        **({"programs": programs} if programs else {}),
    }
