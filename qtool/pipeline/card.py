"""The model card of a checkpoint: written with it, and told what is measured of it later."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from qtool.base import Emit, Notice
from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.marks import CARD_NAME, MEASURED_NAME, is_checkpoint, sealed, unsealed
from qtool.data.licences import text_licence
from qtool.evaluation.agreement import Agreement
from qtool.evaluation.closeness import Closeness
from qtool.evaluation.lm_eval.table import results_table
from qtool.evaluation.perplexity import PerplexityResult
from qtool.evaluation.scores import TaskScores
from qtool.modeling.licence import read_licence
from qtool.modeling.locate import Location
from qtool.pipeline.task_results import ScoreRow, TaskComparison
from qtool.report.card import Provenance, TextUse, model_card
from qtool.report.measured import CloseRecord, Measured, PairedRecord, TaskRecord, TextRecord
from qtool.report.measured_text import with_measured
from qtool.steps.run import Run
from qtool.steps.solve import LayerResult
from qtool.storage.plain_json import write_json_file
from qtool.storage.whole_files import written_whole
from qtool.wording import reason

if TYPE_CHECKING:
    from qtool.pipeline.evaluate import Comparison

ERRORS = {"added_error": "error added to the outputs", "nmse": "error of the weights (NMSE)"}
_MEASURED = TypeAdapter(Measured)


def written_card(
    run: Run, results: Sequence[LayerResult], manifest: Manifest, num_bytes: tuple[int, int]
) -> bytes:
    """Return README.md of a finished run; `num_bytes`: of its weights, and of the original's."""
    values = {
        name: [layer.metrics[key] for layer in results if key in layer.metrics]
        for key, name in ERRORS.items()
    }
    samples: Mapping[str, Any] = run.calibration.provenance if run.calibration else {}
    about = Provenance(
        licence=read_licence(run.source.directory),
        texts=texts_used(samples),
        calibration=_in_words(samples),
        samples_given=run.samples_given,
        missing_tokens=tuple(samples.get("special tokens missing", ())),
        weight_bytes=num_bytes[0],
        source_bytes=num_bytes[1],
        num_weights=sum(prod(spec.shape) for spec in run.source.shards.specs.values()),
        fallbacks=sum(layer.fallback is not None for layer in results),
        errors={name: sum(found) / len(found) for name, found in values.items() if found},
    )
    return sealed(model_card(manifest, run.source.public_name, about)).encode()


def texts_used(samples: Mapping[str, Any]) -> tuple[TextUse, ...]:
    """Return the texts that samples are from, by their provenance; empty without any."""
    sources = samples.get("sources") or ([samples] if samples else [])
    return tuple(
        TextUse(
            name=str(one.get("dataset")),
            licence=text_licence(str(one.get("dataset"))),
            samples=one.get("samples"),
            tokens=one.get("tokens"),
        )
        for one in sources
    )


def _in_words(samples: Mapping[str, Any]) -> str:
    if not samples:
        return "none"
    unknown = {"dataset": "?", "samples": "?", "tokens": "?"}
    return "{dataset}: {samples} samples, {tokens} tokens".format_map({**unknown, **samples})


def note_evaluation(model: Location, found: "Comparison", emit: Emit) -> None:
    """Keep what was measured of a checkpoint beside it, and put it into its card.

    Nothing is done for other models, nor for one in the hub's cache; a card that somebody has
    edited stays as it is. What can't be written is a warning. With an adapter it is another model.
    """
    directory = model.path
    if directory is None or model.adapter is not None or not is_checkpoint(directory):
        return
    kept = read_measured(directory)
    if found.tasks is not None:
        kept = with_tasks(kept, found.tasks)
    elif found.figures:
        *others, last = found.figures
        original = others[0].perplexity if others else None
        kept = replace(kept, texts=text_record(last.perplexity, original, found.closeness))
    _write(directory, kept, emit)


def note_closeness(directory: Path, found: Closeness, emit: Emit) -> None:
    """Keep what the check after quantizing has found, unless more was measured already."""
    kept = read_measured(directory)
    if kept.texts is None or not kept.texts.conditions:
        _write(directory, replace(kept, texts=text_record(None, None, found)), emit)


def read_measured(directory: Path) -> Measured:
    """Return what is kept of a checkpoint; nothing if it is damaged."""
    try:
        content = (directory / MEASURED_NAME).read_bytes()
        return _MEASURED.validate_json(content)
    except (OSError, ValueError):
        return Measured()


def _write(directory: Path, measured: Measured, emit: Emit) -> None:
    path = directory / CARD_NAME
    try:
        write_json_file(directory / MEASURED_NAME, asdict(measured))
        card = unsealed(path.read_text(encoding="utf-8")) if path.is_file() else None
        if card is not None:
            with written_whole(path) as opened:
                opened.write(sealed(with_measured(card, measured)).encode())
    except (OSError, ValueError) as error:
        emit(Notice(f"The model card in {directory} doesn't have these figures: {reason(error)}."))


def text_record(
    result: PerplexityResult | None, original: PerplexityResult | None, closeness: Closeness
) -> TextRecord:
    """Return what a card says of a measurement on texts."""
    found = [one for one in (closeness.text, closeness.chats) if one is not None]
    return TextRecord(
        conditions=result.conditions if result is not None else "",
        perplexity=_finite(result.perplexity) if result is not None else None,
        original=_finite(original.perplexity) if original is not None else None,
        closeness=tuple(map(_close_record, found)),
    )


def _close_record(one: Agreement) -> CloseRecord:
    return CloseRecord(
        dataset=one.dataset,
        positions=one.positions,
        context_length=one.context_length,
        kl=_finite(one.kl_divergence),
        kl_error=_finite(one.kl_standard_error),
        kl_p99=_finite(one.kl_p99),
        same_token=one.top1_agreement,
        same_token_error=one.top1_standard_error,
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def with_tasks(kept: Measured, found: TaskComparison) -> Measured:
    """Return what is kept with the scores of a run; a task that ran before is replaced."""
    tasks = dict(kept.tasks)
    for task in found.model.tasks:
        headline = {(row.task, row.metric, row.filter): row for row in found.rows if row.headline}
        scores = tuple(
            replace(score, items=())
            for score in task.scores
            if (score.task, score.metric, score.filter) in headline and isfinite(score.value)
        )
        rows = [headline[score.task, score.metric, score.filter] for score in scores]
        tasks[task.name] = TaskRecord(
            conditions=_conditions(task, found.versions),
            scores=scores,
            paired=tuple(_paired_record(row) for row in rows if row.paired is not None),
        )
    scores = tuple(score for record in tasks.values() for score in record.scores)
    return replace(kept, tasks=tasks, table=results_table(scores))


def _conditions(task: TaskScores, versions: Mapping[str, str]) -> str:
    settings = task.settings
    subject, limit = settings["model"], settings["limit"]
    return (
        ("all items" if limit is None else f"first {limit} items")
        + f", {subject['dtype']} on {subject['device']}, batch size {settings['batch size']}"
        + (", chat template" if settings["chat template"] else "")
        + f"; lm-eval {versions['lm-eval']}, qtool {versions['qtool']}"
    )


def _paired_record(row: ScoreRow) -> PairedRecord:
    paired = row.paired
    assert paired is not None
    return PairedRecord(
        task=row.task,
        metric=row.metric if row.filter == "none" else f"{row.metric}, {row.filter}",
        original=paired.original,
        value=paired.quantized,
        difference=paired.difference,
        error=paired.standard_error,
        p_value=paired.p_value,
        verdict=row.verdict,
    )
