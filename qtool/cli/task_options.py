"""Options of commands that run tasks of lm-eval."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.base import Emit, Progress
from qtool.cli import early
from qtool.cli.options import checked_seed, in_panel

if TYPE_CHECKING:
    from qtool.evaluation.lm_eval.options import TaskOptions

ANSWERS_KEPT = "Answers and scores are kept: the same command goes on with the next requests."
WITH = "With --tasks"
NEEDS_TASKS = "needs --tasks"
_of_tasks = in_panel(WITH)

TasksOption = Annotated[
    str | None, typer.Option(help="Tasks or groups of lm-eval, comma-separated.")
]
DataDirOption = Annotated[
    Path | None, _of_tasks(help="Folder of local task data: nothing is downloaded.")
]
LimitOption = Annotated[
    int | None, _of_tasks(metavar="N", min=1, help="The first items of each task only.")
]
FewShotOption = Annotated[
    int | None,
    _of_tasks(
        metavar="N", min=0, help="Examples in the prompt; default: 5 for mmlu, else lm-eval's."
    ),
]
BatchSizeOption = Annotated[str, _of_tasks(help="Requests per batch, or auto: by their length.")]
MaxLengthOption = Annotated[
    int | None,
    _of_tasks(metavar="N", min=2, help="Tokens of prompt and answer; default: the model's."),
]
ChatTemplateOption = Annotated[
    bool, _of_tasks("--apply-chat-template", help="Ask as the model was trained.")
]
SeedOption = Annotated[
    int | None,
    _of_tasks(metavar="N", callback=checked_seed, help="Default: lm-eval's seeds."),
]
SamplesOption = Annotated[
    Path | None,
    _of_tasks(
        help="Write prompts, answers and metrics of every item, as JSON lines; gzipped if the "
        "name ends in .gz."
    ),
]
GenerationOption = Annotated[
    str | None,
    _of_tasks(
        metavar="K=V,...",
        help="How answers are written, as lm-eval's: do_sample, temperature, max_gen_toks, "
        "until and so on; default: as each task says.",
    ),
]
ConfirmOption = Annotated[
    bool,
    _of_tasks(
        "--confirm-run-unsafe-code", help="Run programs that the model writes, in a sandbox."
    ),
]
NoCacheOption = Annotated[
    bool,
    _of_tasks(
        "--no-cache/--cache",
        help="Ask all anew and keep nothing; else a stopped run goes on where it was.",
    ),
]


def task_names(tasks: str) -> tuple[str, ...]:
    """Return the names in a list with commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))


def check_tasks(tasks: str | None, data_dir: Path | None, emit: Emit) -> None:
    """Refuse tasks that don't exist and folders without their data, before anything slow.

    Raises:
        DataError: as `early.check_spelling` and `early.check_data`.
    """
    if tasks is None:
        return
    emit(Progress(f"looking up {tasks}"))
    early.check_spelling(task_names(tasks))
    if data_dir is not None:
        early.check_data(task_names(tasks), data_dir)


def asked_tasks(
    tasks: str | None, gen_kwargs: str | None, values: Mapping[str, Any], emit: Emit
) -> "TaskOptions | None":
    """Return what is asked of lm-eval, other values as `TaskOptions` names them; None: nothing.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        DataError: --gen-kwargs is wrong.
    """
    if tasks is None:
        return None
    from qtool.evaluation.lm_eval.options import TaskOptions, parse_generation

    generation = parse_generation(gen_kwargs) if gen_kwargs is not None else {}
    emit(Progress("looking up the tasks in lm-eval"))
    return TaskOptions(tasks=task_names(tasks), generation=generation, **values)


def read_batch_size(text: str) -> int | str:
    """Return a number of requests, or "auto".

    Raises:
        typer.BadParameter: it is neither.
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--batch-size is {text!r}; give a number from 1, or auto.")
    return int(text)
