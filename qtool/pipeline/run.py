"""`run`: a recipe from beginning to end. Quantize, check, evaluate, time, and judge by its gates.

Each step keeps what it has found in `OUT_DIR/run`, with all that decided it; a run that was killed
goes on with the first step that is missing, and comes to the same verdict.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from qtool import settings
from qtool.base import Emit, Progress, ignore_events
from qtool.checkpoint.marks import RUN_FOLDER
from qtool.checkpoint.place import find_place
from qtool.data.corpora import load_corpus, open_dataset
from qtool.engines import EngineOptions
from qtool.evaluation.kept import library_versions
from qtool.evaluation.lm_eval.harness import Tasks
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.modeling.device import default_device, free_memory
from qtool.modeling.digest import model_digest
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.pipeline.bench import BenchOptions, GpuOptions, bench
from qtool.pipeline.check_budgets import check_budgets
from qtool.pipeline.evaluate import Comparison, EvalOptions, evaluate
from qtool.pipeline.kept_steps import KeptStep, KeptSteps, contents_of
from qtool.pipeline.model_figures import versions
from qtool.pipeline.quantize import quantize
from qtool.pipeline.run_figures import bench_report, task_scores, text_report
from qtool.pipeline.run_result import RunResult, judged, write_verdict
from qtool.recipe.measuring import EvalSection
from qtool.recipe.schema import Recipe
from qtool.steps.memory import failures_of_the_machine
from qtool.timing import machine


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a recipe doesn't say of a run: it may come from a stranger."""

    calib_dir: Path | None = None
    """Samples that `calibrate` drew."""
    data_dir: Path | None = None
    """Folder of local task data; None: lm-eval downloads."""
    confirm_unsafe: bool = False
    """Run programs that the model writes."""
    overwrite: bool = False
    """Replace a checkpoint of another run; else go on with what is there."""
    engine: EngineOptions | None = None
    """Workers that share the quantizing; None: this process does it."""


def run_recipe(
    model: Location,
    out_dir: Path,
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    title: str = "recipe",
    emit: Emit = ignore_events,
) -> RunResult:
    """Carry out a recipe with its measurements, and judge the result by its gates.

    Args:
        model: The original.
        out_dir: Gets the checkpoint, and in `run` what was measured of it.
        recipe: With sections `check`, `eval`, `bench` and `gates`, as far as it has some.
        options: What the recipe doesn't say.
        title: Of the recipe, in reports.
        emit: Is told of all steps.

    Raises:
        QtoolError: as `quantize`, `evaluate` and `bench`. What needs no model is found before the
            first step; what was finished is kept.
    """
    check_measurable(recipe, options)
    out_dir = find_place(out_dir).out_dir  # as it is when the result has replaced another
    made = quantize(
        model,
        out_dir,
        recipe.without_measuring(),
        calib_dir=options.calib_dir,
        overwrite=options.overwrite,
        resume=not options.overwrite,
        engine=options.engine,
        emit=emit,
    )
    free_memory()
    about = {"model": model.name, "device": str(default_device())}
    steps = _Steps(model, out_dir, recipe, options, emit)
    with failures_of_the_machine(str(default_device()), out_dir):
        result = judged(title, about, out_dir, recipe, made, steps.all())
        write_verdict(result)
    return result


def check_measurable(recipe: Recipe, options: RunOptions) -> None:
    """Refuse what can't be measured here, before anything is done.

    Raises:
        DataError: a text, a task or its data isn't there, or a task runs programs that the model
            writes and nobody has agreed.
        BackendError: the kernels are to be timed, and there is no card that they run on.
        MissingExtraError: what is needed isn't installed.
    """
    section = recipe.eval
    if section is not None:
        if section.dataset is not None:
            load_corpus(section.dataset)
            if section.chats is not None:
                open_dataset(section.chats)
        if section.tasks:
            Tasks(_task_options(section, options)).check()
    if recipe.bench is not None and recipe.bench.gpu:
        machine.require_card()


def _task_options(section: EvalSection, options: RunOptions) -> TaskOptions:
    return TaskOptions(
        tasks=section.tasks,
        data_dir=options.data_dir,
        num_fewshot=section.num_fewshot,
        limit=section.limit,
        batch_size=section.batch_size,
        max_length=section.max_length,
        chat_template=section.chat_template,
        confirm_unsafe=options.confirm_unsafe,
    )


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps after quantizing: each reads OUT_DIR, and keeps what it has found there."""

    model: Location
    out_dir: Path
    recipe: Recipe
    options: RunOptions
    emit: Emit

    def all(self) -> dict[str, KeptStep]:
        """Take all steps that the recipe asks for, in their order."""
        keep = KeptSteps(self.out_dir / RUN_FOLDER)
        asked = self.recipe.eval
        found: dict[str, KeptStep] = {}
        if self.recipe.check is not None:
            found["check"] = keep.once("check", self._made_of(self.recipe.check), self.check)
        if asked is not None and asked.dataset is not None:
            texts = contents_of(asked.dataset, asked.chats)
            made_of = {**self._made_of(asked), "texts": texts}
            found["text"] = keep.once("text", made_of, self.text)
        if asked is not None and asked.tasks:
            data = contents_of(self.options.data_dir)
            made_of = {**self._made_of(asked), "data": data, "libraries": library_versions()}
            found["tasks"] = keep.once("tasks", made_of, self.tasks)
        if self.recipe.bench is not None:
            found["bench"] = keep.once("bench", self._made_of(self.recipe.bench), self.bench)
        return found

    def _made_of(self, section: BaseModel) -> dict[str, Any]:
        """Return all that decides what a step finds."""
        device = default_device()
        on_card = device.type == "cuda"
        self.emit(Progress("reading the model's files"))
        return {
            "result": model_digest(self.out_dir),
            "original": model_digest(self.model.directory),
            "section": section.model_dump(mode="json"),
            "device": torch.cuda.get_device_name(device) if on_card else device.type,
            "switches": settings.given(settings.EXECUTION),
            "versions": versions(),
        }

    def check(self) -> dict[str, Any]:
        """Compare the result's files with the original, and mark it."""
        assert self.recipe.check is not None
        source = open_source(self.model)
        _, lines = check_budgets(source, self.out_dir, self.recipe.check, self.emit)
        return {"budgets": [asdict(line) for line in lines]}

    def text(self) -> dict[str, Any]:
        """Measure perplexity and closeness."""
        section = self.recipe.eval
        assert section is not None
        assert section.dataset is not None
        options = EvalOptions(
            dataset=section.dataset,
            context_length=section.context_length,
            max_windows=section.windows,
            texts=section.texts,
            chats=section.chats,
        )
        return text_report(self._evaluated(options))

    def tasks(self) -> dict[str, Any]:
        """Run tasks of lm-eval."""
        assert self.recipe.eval is not None
        asked = _task_options(self.recipe.eval, self.options)
        found = self._evaluated(EvalOptions(tasks=asked)).tasks
        assert found is not None
        return task_scores(found)

    def _evaluated(self, options: EvalOptions) -> Comparison:
        assert self.recipe.eval is not None
        baseline = self.model if self.recipe.eval.baseline else None
        return evaluate(Location(self.out_dir), options, baseline=baseline, emit=self.emit)

    def bench(self) -> dict[str, Any]:
        """Time the result beside the original."""
        assert self.recipe.bench is not None
        gpu = GpuOptions() if self.recipe.bench.gpu else None
        options = BenchOptions(backend=None if gpu else self.recipe.bench.backend, gpu=gpu)
        result = Location(self.out_dir)
        found = bench(result, options, baseline=self.model, emit=self.emit)
        return bench_report(found, result, self.model)
