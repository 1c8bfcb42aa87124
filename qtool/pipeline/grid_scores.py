"""Many tasks, and a text, for many models: each pair is a cell of a grid, one worker's.

Tasks are asked without a baseline: `qtool compare` pairs the answers, which are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qtool import settings
from qtool.data.corpora import load_corpus
from qtool.errors import QtoolError
from qtool.evaluation.kept import library_versions
from qtool.evaluation.lm_eval.harness import Tasks
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.modeling.device import default_device, free_memory, use_device
from qtool.modeling.digest import model_digest
from qtool.modeling.locate import Location
from qtool.pipeline.evaluate import EvalOptions, evaluate
from qtool.pipeline.kept_steps import KeptSteps, contents_of
from qtool.pipeline.model_figures import versions
from qtool.pipeline.run_figures import task_failures, task_scores, text_figures, text_report
from qtool.storage.plain_json import plain_json

SCORES_FOLDER = "scores"
"""Of a model in a grid: what was measured of it, and of what was made of it."""
TEXT_CELL = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class GridScores:
    """What is measured of all models of a grid."""

    tasks: TaskOptions | None = None
    """Each task is a cell; None: none."""
    text: EvalOptions | None = None
    """Perplexity, and of what was made closeness to its original; None: neither."""

    def check(self) -> None:
        """Refuse what can't be measured here, before anything is done.

        Raises:
            DataError: the text, a task or its data isn't there, or a task runs programs that the
                model writes and nobody has agreed.
            MissingExtraError: lm-eval isn't installed.
        """
        if self.text is not None:
            load_corpus(self.text.dataset)
        if self.tasks is not None:
            Tasks(self.tasks).check()

    def asked(self) -> dict[str, EvalOptions]:
        """Return what each cell of a model measures, by its name."""
        found = {} if self.text is None else {TEXT_CELL: self.text}
        if self.tasks is not None:
            for task in self.tasks.tasks:
                found[task] = EvalOptions(tasks=replace(self.tasks, tasks=(task,)))
        return found


@dataclass(frozen=True, slots=True)
class ScoreCell:
    """A text or a task on one model: the argument of `run_score`."""

    subject: Location
    original: Location
    """The same, if nothing was made of it."""
    recipe: str | None
    """That has made it; None: it is the original."""
    measured: str
    options: EvalOptions
    folder: Path
    """Where what is found is kept."""
    device: str

    @property
    def name(self) -> str:
        """Model, recipe and what is measured."""
        return _name(self.original.name, self.recipe, self.measured)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What became of such a cell."""

    model: str
    """The original."""
    recipe: str | None
    measured: str
    """The task, or `text`."""
    scores: Sequence[Mapping[str, Any]] = ()
    """Of a task: rows as `qtool eval --json` has them."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Of a text: perplexity and closeness, as gates read them."""
    seconds: float = 0.0
    failure: str | None = None
    """Why there is no result."""

    @property
    def name(self) -> str:
        """As of its cell."""
        return _name(self.model, self.recipe, self.measured)


def _name(*words: str | None) -> str:
    return ", ".join(word for word in words if word is not None)


def score_cells(
    asked: GridScores,
    models: Mapping[str, Location],
    made: Sequence[tuple[str, str, Path]],
    out_dir: Path,
) -> list[ScoreCell]:
    """Return the cells of all models and of all that was made of them, each model's together.

    Args:
        asked: What is measured.
        models: The originals, by their folders.
        made: Folder of the model, recipe and directory of each checkpoint.
        out_dir: Of the grid.
    """
    device = str(default_device())
    cells = []
    for folder, original in models.items():
        own = [(title, Location(path)) for of, title, path in made if of == folder]
        for title, subject in [(None, original), *own]:
            kept = out_dir / folder / SCORES_FOLDER
            if title is not None:
                kept /= subject.directory.name
            cells += [
                ScoreCell(subject, original, title, name, options, kept, device)
                for name, options in asked.asked().items()
            ]
    return cells


def run_score(cell: ScoreCell) -> ScoreResult:
    """Measure a cell, unless that was done; what fails in it is a part of what is returned."""
    found = ScoreResult(cell.original.name, cell.recipe, cell.measured)
    try:
        with use_device(cell.device):
            cell.folder.mkdir(parents=True, exist_ok=True)
            name = cell.measured.replace("/", "-")
            kept = KeptSteps(cell.folder).once(name, _made_of(cell), lambda: _measured(cell))
    except QtoolError as error:
        return replace(found, failure=str(error))
    finally:
        free_memory()
    found = replace(found, seconds=kept.seconds)
    if cell.options.tasks is None:
        return replace(found, figures=text_figures(kept.result))
    failures = task_failures(kept.result)
    return replace(found, scores=kept.result["rows"], failure="; ".join(failures) or None)


def _measured(cell: ScoreCell) -> Mapping[str, Any]:
    """Return what is kept of a cell."""
    if cell.options.tasks is not None:
        scored = evaluate(cell.subject, cell.options).tasks
        assert scored is not None
        return task_scores(scored)
    baseline = None if cell.recipe is None else cell.original
    return text_report(evaluate(cell.subject, cell.options, baseline=baseline))


def _made_of(cell: ScoreCell) -> Mapping[str, Any]:
    """Return all that decides what a cell finds."""
    device = default_device()
    options = cell.options
    data = [options.dataset, options.chats] if options.tasks is None else [options.tasks.data_dir]
    found = {
        "model": model_digest(cell.subject.directory),
        "original": model_digest(cell.original.directory),
        "options": plain_json(asdict(options)),
        "data": contents_of(*data),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "switches": settings.given(settings.EXECUTION),
        "versions": versions(),
    }
    return found if options.tasks is None else {**found, "libraries": library_versions()}
