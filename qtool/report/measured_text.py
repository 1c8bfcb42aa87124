"""The section of a model card on what was measured; Markdown."""

from collections.abc import Iterable, Iterator, Sequence

from qtool.report.measured import CloseRecord, Measured, PairedRecord
from qtool.wording import with_error

_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"
NOT_MEASURED = (
    "Nothing was measured yet. `qtool eval` adds what it finds, as long as nobody edits this page."
)


def with_measured(card: str, measured: Measured) -> str:
    """Return a card with another section; as it is if it has no place for one."""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + measured_section(measured) + after if begin and end else card


def measured_section(measured: Measured) -> str:
    """Return the section, between its marks."""
    parts = [*_texts(measured), *_tasks(measured)] or [NOT_MEASURED]
    return "\n\n".join([_BEGIN, *parts, _END])


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first columns are at the left, the others at the right."""
    sides = [":---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(_line(cells) for cells in (columns, sides, *rows))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _texts(measured: Measured) -> Iterator[str]:
    found = measured.texts
    if found is None:
        return
    if found.perplexity is not None:
        row = [found.conditions, f"{found.perplexity:.3f}"]
        row += [] if found.original is None else [f"{found.original:.3f}"]
        yield markdown_table(["perplexity on", "this model", "original"][: len(row)], [row])
    if found.closeness:
        columns = ["against the original, on", "KL divergence", "99th percentile", "same token"]
        yield markdown_table([*columns, "predictions"], map(_close_cells, found.closeness))
        yield (
            "KL(original || this model) in nats per token; same token: both find the same one most "
            "probable. ± is one standard error."
        )


def _close_cells(one: CloseRecord) -> list[str]:
    return [
        f"{one.dataset}, windows of {one.context_length} tokens",
        "-" if one.kl is None else with_error(one.kl, one.kl_error),
        "-" if one.kl_p99 is None else with_error(one.kl_p99),
        with_error(one.same_token, one.same_token_error, percent=True),
        str(one.positions),
    ]


def _tasks(measured: Measured) -> Iterator[str]:
    if not measured.tasks:
        return
    yield measured.table.strip("\n")
    paired = [one for record in measured.tasks.values() for one in record.paired]
    if paired:
        columns = ["task", "metric", "original", "this model", "difference", "p", "verdict"]
        yield markdown_table(columns, map(_paired_cells, paired), left=2)
        yield (
            "Differences are paired, item by item; ± is one standard error. A verdict needs "
            "p < 0.05 and says nothing of rows beside it."
        )
    by_conditions: dict[str, list[str]] = {}
    for name, record in measured.tasks.items():
        by_conditions.setdefault(record.conditions, []).append(name)
    yield "\n".join(f"- {', '.join(names)}: {said}." for said, names in by_conditions.items())


def _paired_cells(one: PairedRecord) -> list[str]:
    p_value = "" if one.p_value is None else f"{one.p_value:.2g}"
    difference = with_error(one.difference, one.error)
    numbers = [f"{one.original:.4f}", f"{one.value:.4f}", difference, p_value]
    return [one.task, one.metric, *numbers, one.verdict]
