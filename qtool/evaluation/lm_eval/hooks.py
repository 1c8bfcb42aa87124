"""What of lm-eval is replaced while it works: inside a block, and by nothing that it could notice.

Code tasks load the metric `code_eval` through `evaluate.load`, which would fetch it from the hub
and run programs in a fork of this process: while tasks are loaded, that one name gives
`sandbox.code_eval.CodeEval`.
"""

import contextlib
import difflib
import functools
import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from qtool.errors import require
from qtool.sandbox.code_eval import CodeEval


def require_lm_eval() -> None:
    """Raise unless lm-eval is installed."""
    require("Running tasks", "eval", "lm_eval")


def describe_unknown(name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown task; lm-eval has too many to list."""
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"lm-eval has no task, group or tag '{name}'.{hint} `lm-eval ls tasks` lists all."


@functools.cache
def task_manager() -> Any:  # noqa: ANN401
    """Return lm-eval's manager; indexing its thousands of tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval off the terminal inside the block."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    with_bars = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        with (
            mock.patch.object(log, "propagate", new=False),
            mock.patch.object(log, "handlers", [logging.NullHandler()]),
            mock.patch.object(lm_eval.api.task, "tqdm", functools.partial(tqdm, disable=True)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        if with_bars:
            datasets.enable_progress_bars()


def templates_compiled_once() -> AbstractContextManager[Any]:
    """Let lm-eval compile a task's templates once inside the block, not for every prompt.

    For mmlu with five examples that is 98,408 times, and longer than a card needs for the answers.
    """
    from lm_eval.utils import env

    compiled = functools.lru_cache(maxsize=1024)(env.from_string)
    return mock.patch.object(env, "from_string", compiled)


def sandboxed_code_eval() -> AbstractContextManager[Any]:
    """Let `evaluate.load("code_eval")` give the sandboxed metric inside the block."""
    import evaluate

    shipped = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return CodeEval() if path == "code_eval" else shipped(path, *args, **kwargs)

    return mock.patch.object(evaluate, "load", load)
