"""lm-eval's tasks, found and loaded as this tool needs them: offline, quiet, code in a sandbox.

Nothing of lm-eval is edited. Its index of tasks is a dictionary of configurations; those that are
asked for get `custom_dataset`, lm-eval's own hook for data from elsewhere. Code tasks load the
metric `code_eval` through `evaluate.load`, which would fetch it from the hub and run programs in a
fork of this process: while tasks are loaded, that one name gives `code_metric.CodeEval`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from qtool.errors import DataError, MissingExtraError
from qtool.evaluation.code_metric import CodeEval
from qtool.evaluation.local_data import LocalSplits
from qtool.plugins import describe_miss

CUSTOMARY_SHOTS: Mapping[str, int] = {"mmlu": 5}
"""Examples in the prompt where papers agree on a number that lm-eval doesn't set."""


def require_lm_eval() -> None:
    """Raise unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("Running tasks", "eval")


def customary_shots(task: str) -> int | None:
    """Return the customary number of examples of a task; None: what lm-eval says."""
    return next((n for name, n in CUSTOMARY_SHOTS.items() if task.startswith(name)), None)


@contextlib.contextmanager
def quiet() -> Iterator["Heard"]:
    """Keep lm-eval off the terminal inside the block; yields what it warned of."""
    import lm_eval.api.task
    from tqdm import tqdm

    heard, logger = Heard(), logging.getLogger("lm_eval")
    handler, before = _Listener(heard), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    silent = functools.partial(tqdm, disable=True)
    try:
        with (
            mock.patch.object(lm_eval.api.task, "tqdm", silent),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield heard
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@dataclasses.dataclass(slots=True)
class Heard:
    """What lm-eval warned of."""

    truncated: int = 0
    """Requests that were longer than the model's context and were cut from the left."""


class _Listener(logging.Handler):
    def __init__(self, heard: Heard) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.truncated += "runcati" in record.getMessage()


class Tasks:
    """The tasks that lm-eval knows, with data from a folder if there is one."""

    def __init__(self, data_dir: Path | None = None, num_fewshot: int | None = None) -> None:
        require_lm_eval()
        if data_dir is not None and not data_dir.is_dir():
            raise DataError(f"There is no data folder {data_dir}.")
        self.data_dir, self.num_fewshot = data_dir, num_fewshot
        self._manager = _manager()
        self._shipped = dict(self._manager.task_index)
        self.data_files: dict[str, list[Path]] = {}
        """Files that were read, by requested task."""

    def check(self, names: Sequence[str], *, confirm_unsafe: bool) -> None:
        """Refuse what can't run, before a model is loaded.

        Args:
            names: Tasks, groups or tags of lm-eval.
            confirm_unsafe: Programs that a model wrote may run.

        Raises:
            DataError: a name is unknown, a file is missing, or a task runs programs unasked.
        """
        for name in names:
            if name not in self._shipped:
                raise DataError(
                    describe_miss(name, tuple(sorted(self._shipped)), "tasks of lm-eval")
                )
        unsafe = self.unsafe(names)
        if unsafe and not confirm_unsafe:
            raise DataError(
                f"{', '.join(dict.fromkeys(unsafe))}: runs programs that the model writes, in a "
                "sandbox (docs/evaluation.md says how far it holds). "
                "Add --confirm-run-unsafe-code if that's what you want."
            )
        for name in names:
            self.load(name)

    def unsafe(self, names: Sequence[str]) -> list[str]:
        """Return those tasks of the names that run programs that the model writes."""
        return [n for name in names for n in self.leaves(name) if self._config(n, "unsafe_code")]

    def leaves(self, name: str) -> list[str]:
        """Return the tasks that a task, a group or a tag stands for."""
        entry = self._shipped[name]
        config = entry.cfg or {}
        if entry.tags and not config:
            return [leaf for tagged in sorted(entry.tags) for leaf in self.leaves(tagged)]
        members = config.get("task")
        if "group" not in config or not isinstance(members, list):
            return [name]
        names = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in members]
        return [leaf for n in names if n in self._shipped for leaf in self.leaves(n)]

    def load(self, name: str) -> list[Any]:
        """Return lm-eval's objects for a name: one group, or tasks.

        Raises:
            DataError: a file is missing, or the data set can't be had.
        """
        index = self._manager.task_index
        splits = {}
        if self.data_dir is not None:
            for leaf in self.leaves(name):
                splits[leaf] = LocalSplits(
                    self.data_dir,
                    leaf,
                    self._config(leaf, "dataset_path"),
                    self._config(leaf, "dataset_name"),
                )
                index[leaf] = self._with_data(leaf, splits[leaf], self.shots(name))
        try:
            with quiet(), sandboxed_code_eval():
                loaded = self._manager.load([name])
        except DataError:
            raise
        except Exception as error:  # lm-eval and datasets raise many unrelated types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"lm-eval can't load task {name}: {reason} With --data-dir DIR it reads local "
                "files."
            ) from error
        finally:
            index.update({leaf: self._shipped[leaf] for leaf in splits})
        self.data_files[name] = [s.file_of(key) for s in splits.values() for key in s]
        group = loaded.get("groups", {}).get(name)
        return [group] if group is not None else list(loaded["tasks"].values())

    def shots(self, name: str) -> int | None:
        """Return the examples that a requested name gets in its prompts; None: lm-eval's number."""
        return customary_shots(name) if self.num_fewshot is None else self.num_fewshot

    def _with_data(self, leaf: str, splits: LocalSplits, shots: int | None) -> Any:  # noqa: ANN401
        """Return an entry of lm-eval's index that takes its data from `splits`.

        lm-eval reads the training split even if no example is wanted; without its file it isn't
        told of that split, unless examples come from there.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._shipped[leaf]
        with sandboxed_code_eval():  # a task's functions are imported here
            config = load_yaml(entry.yaml_path, resolve_func=True)
        training, fixed = config.get("training_split"), config.get("num_fewshot")
        wanted = fixed if shots is None or fixed == 0 else shots
        own_source = config.get("fewshot_split") or config.get("fewshot_config")
        if training is not None and not splits.has(training):
            if wanted and not own_source:
                splits.file_of(training)  # raises, and names the file
            config["training_split"] = None
        config["custom_dataset"] = lambda **_settings: splits
        return dataclasses.replace(entry, yaml_path=None, cfg=config)

    def _config(self, leaf: str, key: str) -> Any:  # noqa: ANN401
        return (self._shipped[leaf].cfg or {}).get(key)


@functools.cache
def _manager() -> Any:  # noqa: ANN401
    """Return lm-eval's manager; indexing its thousands of tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


@contextlib.contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """Let `evaluate.load("code_eval")` give the sandboxed metric inside the block."""
    import evaluate

    shipped = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return CodeEval() if path == "code_eval" else shipped(path, *args, **kwargs)

    with mock.patch.object(evaluate, "load", load):
        yield
