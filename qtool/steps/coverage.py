"""How many calibration tokens each expert got, and what starved ones were solved for."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from qtool.base import Emit, Notice
from qtool.checkpoint.manifest import LayerEntry
from qtool.core.experts import ExpertName, expert_name
from qtool.wording import list_names


class _Result(Protocol):
    """A layer of the report."""

    @property
    def name(self) -> str: ...
    @property
    def entry(self) -> LayerEntry: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


WORSE = "worse_than_rounding"
Coverage = Mapping[str, Mapping[str, Any]]
"""By dotted name of the experts: `tokens`, calibration tokens of each expert in order; `starved`,
by layer that has fewer tokens than inputs, which tokens it was solved for; `worse_than_rounding`,
layers that are, on held-out tokens."""


def coverage(results: Iterable[_Result]) -> Coverage:
    """Return what samples covered; nothing if there were no samples, or no experts."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        expert, tokens = expert_name(result.name), result.metrics.get("tokens")
        if expert is None or tokens is None:
            continue
        empty: dict[str, Any] = {"tokens": {}, "starved": {}, WORSE: []}
        part = found.setdefault(expert.module, empty)
        layer = str(ExpertName("", expert.weight, expert.number))
        part["tokens"][expert.number] = int(tokens)
        if tokens < result.entry.shape.in_features:
            part["starved"][layer] = result.entry.tokens_from or "routed"
        if result.metrics["output_error"] > result.metrics["output_error_rounded"]:
            part[WORSE].append(layer)
    for part in found.values():
        part["tokens"] = [part["tokens"][index] for index in sorted(part["tokens"])]
    return found


def warn_of_experts(found: Coverage, emit: Emit) -> None:
    """Say once that experts got few tokens, and once that solving them was no use."""
    worse = [f"{module}.{layer}" for module, part in found.items() for layer in part[WORSE]]
    if worse:
        message = (
            f"On held-out tokens {len(worse)} layers of experts are worse than rounding to "
            f"nearest: {list_names(worse)}. Use more samples, or text more like the model's."
        )
        emit(Notice(message))
    _warn_of_starved(found, emit)


def _warn_of_starved(found: Coverage, emit: Emit) -> None:
    starved = [layer for part in found.values() for layer in part["starved"]]
    if not starved:
        return
    total = sum(len(part["tokens"]) for part in found.values())
    hit = sum(
        len({layer.partition("[")[2] for layer in part["starved"]}) for part in found.values()
    )
    fewest, where = min(
        (tokens, f"expert {index} of {module}")
        for module, part in found.items()
        for index, tokens in enumerate(part["tokens"])
    )
    choices = [choice for part in found.values() for choice in part["starved"].values()]
    counts = ", ".join(
        f"{choices.count(choice)} {what}"
        for choice, what in (
            ("routed", "for its own tokens all the same"),
            ("all", "as if all tokens were routed to it"),
            ("pooled", "for what the layers of all experts see"),
        )
        if choice in choices
    )
    emit(
        Notice(
            f"{hit} of {total} experts got fewer calibration tokens than a layer of theirs has "
            f"inputs; the fewest, {fewest}, {where}. Held-out error chose what such a layer was "
            f"solved for: {counts}. More samples, or text like the model's use, reach more "
            "experts; quantization_report.json has the tokens of each."
        )
    )
