"""The section on quality: closeness to the original, perplexity, scores of tasks."""

from collections.abc import Iterator

from qtool.recipe.gates import ON_CHATS, ON_TEXT
from qtool.report.lengths import Axes
from qtool.report.page.drawing import INK, SERIES
from qtool.report.page.evidence import Evidence, Facts
from qtool.report.page.parts import Absent, PageSection, PageTable, Part, Picture, Words
from qtool.report.page.wordings import Z_95, interval, text_of

_TITLE = "Evaluation"
MOST_TASKS = 24
LONGEST_TICK = 24
INTERVALS = (
    "± is half of a 95 % interval, 1.96 standard errors, which counts predictions and items as if "
    "they were independent."
)


def scores_section(evidence: Evidence) -> PageSection | Absent:
    """Return all that was measured of the quality, with intervals."""
    parts = [*_closeness(evidence), *_perplexities(evidence), *_tasks(evidence)]
    if not parts:
        return Absent(
            _TITLE,
            "Nothing was evaluated: see `qtool eval OUT_DIR --baseline MODEL --json "
            "OUT_DIR/eval.json`, or a recipe with a section `eval`.",
        )
    return PageSection(_TITLE, (Words(INTERVALS), *parts))


def _closeness(evidence: Evidence) -> Iterator[Part]:
    rows, equal = [], None
    for what in (ON_TEXT, ON_CHATS):
        found = evidence.agreement(what)
        if not found:
            continue
        rows.append(
            (
                f"{what} ({found['dataset']})",
                f"{found['positions']:,}",
                interval(found["kl_divergence"], found["kl_standard_error"]),
                text_of(found["kl_p99"]),
                interval(found["top1_agreement"], found["top1_standard_error"], 100),
            )
        )
        equal = equal if found.get("greedy_equal_share") is None else found["greedy_equal_share"]
    if rows:
        columns = (
            *("text", ">predictions", ">KL, nats per token"),
            *(">99th percentile, nats", ">same likeliest token, %"),
        )
        yield PageTable("Closeness to the original", columns, tuple(rows))
    if equal is not None:
        yield Words(f"Greedy continuations: the first {equal:.0%} are equal on average.")


def _perplexities(evidence: Evidence) -> Iterator[Part]:
    figures = [one for one in evidence.texts.get("figures") or () if one.get("perplexity")]
    rows = [
        (one["name"], text_of(one["perplexity"]["perplexity"]), f"{one['average_bits']:.2f}")
        for one in figures
    ]
    if rows:
        about = figures[-1]["perplexity"]
        caption = (
            f"Perplexity on {about['dataset']}, {about['windows']} of "
            f"{about['windows_in_dataset']} windows of {about['context_length']} tokens, "
            f"{about['dtype']} on {about['device']}"
        )
        yield PageTable(caption, ("model", ">perplexity", ">bits per weight"), tuple(rows))


def _tasks(evidence: Evidence) -> Iterator[Part]:
    rows = list(evidence.tasks.get("rows") or ())
    if rows:
        columns = (
            "task",
            "metric",
            ">items",
            ">original",
            ">result",
            ">difference",
            ">p",
            "verdict",
        )
        yield PageTable("Scores of tasks", columns, tuple(map(_row, rows)))
        drawn = [
            row
            for row in rows
            if row["headline"] and (row["paired"] or {}).get("standard_error") is not None
        ]
        if drawn:
            yield _differences(drawn[:MOST_TASKS])
    failures = evidence.tasks.get("failures") or ()
    if failures:
        cells = tuple((one["task"], one["model"], one["message"]) for one in failures)
        yield PageTable("Tasks that failed", ("task", "model", "why"), cells)


def _row(row: Facts) -> tuple[str, ...]:
    paired = row["paired"] or {}
    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
    p_value = paired.get("p_value")
    alone = row["original"] is None
    return (
        row["task"],
        metric,
        f"{row['num_items']:,}",
        "" if alone else text_of(row["original"]),
        interval(row["value"], row["standard_error"]) if alone else text_of(row["value"]),
        interval(paired["difference"], paired["standard_error"]) if paired else "",
        "" if p_value is None else f"{p_value:.2g}",
        row["verdict"],
    )


def _differences(rows: list[Facts]) -> Picture:
    def paint(axes: Axes) -> None:
        places = range(len(rows))
        values = [row["paired"]["difference"] for row in rows]
        errors = [Z_95 * row["paired"]["standard_error"] for row in rows]
        axes.errorbar(values, places, xerr=errors, fmt="o", color=SERIES[0], capsize=2)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(places, [_name(row) for row in rows], fontsize=9)
        axes.margins(y=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("difference to the original, in the score's unit")
        axes.set_ylabel("task")

    said = [f"{_name(row)} {row['paired']['difference']:+.4f}" for row in rows]
    words = "Paired differences with their 95 % intervals: " + ", ".join(said) + "."
    return Picture("Differences to the original, item by item", words, paint)


def _name(row: Facts) -> str:
    name = f"{row['task']} {row['metric']}"
    return name if len(name) <= LONGEST_TICK else f"{name[: LONGEST_TICK - 1]}…"
