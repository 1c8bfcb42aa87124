"""The table that `lm_eval` prints."""

from collections.abc import Sequence
from typing import Any

from qtool.evaluation.lm_eval.hooks import require_lm_eval
from qtool.evaluation.scores import Score


def results_table(scores: Sequence[Score]) -> str:
    """Return scores as lm-eval's own function writes them in Markdown.

    Raises:
        MissingExtraError: lm-eval isn't installed.
    """
    require_lm_eval()
    from lm_eval.utils import make_table

    names = ("results", "versions", "n-shot", "higher_is_better")
    tables: dict[str, dict[str, Any]] = {name: {} for name in names}
    for one in scores:
        error = "N/A" if one.standard_error is None else one.standard_error
        row = tables["results"].setdefault(one.task, {"alias": one.task})
        row[f"{one.metric},{one.filter}"] = one.value
        row[f"{one.metric}_stderr,{one.filter}"] = error
        tables["versions"][one.task] = one.version
        tables["higher_is_better"].setdefault(one.task, {})[one.metric] = one.higher_is_better
        if one.shots is not None:
            tables["n-shot"][one.task] = one.shots
    return str(make_table(tables)).rstrip("\n")
