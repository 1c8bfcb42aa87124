"""The check of a recipe with a section `check`: budgets that fail a run, and mark its result.

What failed stays on disk, and says so: `check` in quantization_report.json, which `qtool inspect`
prints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtool.base import Emit, Progress
from qtool.checkpoint.marks import REPORT_NAME, read_report
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError
from qtool.evaluation.agreement import Agreement
from qtool.evaluation.closeness import Closeness
from qtool.modeling.load import load_tokenizer
from qtool.modeling.source import ModelSource
from qtool.pipeline.check import check_result
from qtool.recipe.gates import ON_CHATS, ON_TEXT
from qtool.recipe.measuring import CheckSection
from qtool.report.verdict import GateLine, line_of
from qtool.storage.plain_json import write_json_file


def check_budgets(
    source: ModelSource, out_dir: Path, section: CheckSection, emit: Emit
) -> tuple[Closeness | None, tuple[GateLine, ...]]:
    """Read a checkpoint's files again, compare it with its original, and mark it.

    Raises:
        CheckpointError: a file isn't what was written.
        OSError: the report can't be written.
    """
    emit(Progress("reading the result again"))
    reader = CheckpointReader(out_dir)
    if reader.manifest.digests:
        reader.verify(emit)
    found = check_result(source, out_dir, emit, section)
    report = read_report(out_dir)
    if not report:
        raise CheckpointError(f"{out_dir}: {REPORT_NAME} is missing or damaged.", file=out_dir)
    fallbacks = sum(layer.get("fallback") is not None for layer in report.get("layers", ()))
    has_chats = bool(load_tokenizer(source.directory).chat_template)
    lines = budget_lines(section, found, fallbacks, has_chats=has_chats)
    values = {**report, "check": _mark(section, found, fallbacks, lines)}
    write_json_file(out_dir / REPORT_NAME, values)
    return found, lines


def budget_lines(
    section: CheckSection, found: Closeness | None, fallbacks: int, *, has_chats: bool
) -> tuple[GateLine, ...]:
    """Return a line for each budget; what couldn't be measured has failed.

    Without a template of the model's there are no chats to compare on.
    """
    lines: list[GateLine] = []
    if section.max_kl is not None:
        text = None if found is None else found.text
        chats = None if found is None else found.chats
        why = "" if found is None else found.no_chats or ""
        not_compared = "it wasn't compared with the original; the warning above says why"
        lines.append(_kl_line(section.max_kl, ON_TEXT, text, not_compared))
        if has_chats:
            lines.append(_kl_line(section.max_kl, ON_CHATS, chats, why or not_compared))
    if section.max_fallbacks is not None:
        lines.append(line_of("check.max_fallbacks", "", section.max_fallbacks, fallbacks))
    return tuple(lines)


def _kl_line(limit: float, of: str, found: Agreement | None, why_not: str) -> GateLine:
    value, note = (None, why_not) if found is None else (found.kl_divergence, "")
    return line_of("check.max_kl", of, limit, value, unit="nats per token", note=note)


def _mark(
    section: CheckSection,
    found: Closeness | None,
    fallbacks: int,
    lines: Sequence[GateLine],
) -> Mapping[str, Any]:
    """Return what the report says of a check."""
    measured = {} if found is None else {ON_TEXT: found.text, ON_CHATS: found.chats}
    return {
        "passed": all(line.passed for line in lines),
        "failed": [line.sentence() for line in lines if not line.passed],
        "budgets": section.model_dump(mode="json"),
        "fallbacks": fallbacks,
        **{what: asdict(one) for what, one in measured.items() if one is not None},
    }
