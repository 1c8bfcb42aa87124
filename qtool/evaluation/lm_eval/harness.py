"""lm-eval's tasks, found and loaded as this tool needs them: offline, quiet, code in a sandbox.

Nothing of lm-eval is edited. Its index of tasks is a dictionary of configurations; those that are
asked for get `custom_dataset`, lm-eval's own hook for data from elsewhere.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch

from qtool.data.local_datasets import DataFolder, LocalSplits
from qtool.errors import DataError
from qtool.evaluation.lm_eval.hooks import (
    describe_unknown,
    quiet,
    require_lm_eval,
    sandboxed_code_eval,
    task_manager,
)
from qtool.evaluation.lm_eval.options import TaskOptions
from qtool.sandbox.run import protections
from qtool.storage.digests import files_digest
from qtool.wording import reason

CUSTOMARY_SHOTS: Mapping[str, int] = {"mmlu": 5}
"""Examples in the prompt of a group's tasks, where papers agree and lm-eval sets no number."""
SANDBOXED = ("humaneval", "humaneval_infilling", "mbpp")
"""Folders of lm-eval whose tasks run programs through `code_eval` alone, hence in the sandbox."""
Loaded = dict[str, Any]
"""What lm-eval's manager returns: `tasks` and `groups` by their names."""


class Tasks:
    """The tasks that lm-eval knows, and those that are asked for."""

    def __init__(self, options: TaskOptions) -> None:
        """Read lm-eval's index.

        Raises:
            MissingExtraError: lm-eval isn't installed.
            DataError: there is no such data folder.
        """
        require_lm_eval()
        folder = options.data_dir
        self.options, self._folder = options, DataFolder(folder) if folder is not None else None
        self._manager = task_manager()
        self._shipped = dict(self._manager.task_index)
        self.digests: dict[str, Any] = {}
        """What tells the data of a requested task from others, as `check` has found them."""
        self.writing: set[str] = set()
        """Requested tasks in which a model writes text."""

    def check(self) -> None:
        """Refuse what can't run, before a model is loaded.

        Raises:
            DataError: a task is unknown, its data is missing, it runs programs unasked or outside
                the sandbox, or there is nothing that the settings of generation apply to.
            QtoolError: a task runs programs, and the sandbox can't be set up here.
        """
        names = self.options.tasks
        if not names:
            raise DataError("No task is named. Give some, such as --tasks mmlu,arc_easy.")
        for name in names:
            if name not in self._shipped:
                raise DataError(describe_unknown(name, self._shipped))
        unsafe = self._check_unsafe()
        for name in names:
            self.digests[name] = self._digest(self.load(name))
        if self.options.generation and not self.writing:
            raise DataError(
                f"--gen-kwargs says how a model writes, and in {', '.join(names)} it writes "
                "nothing. Leave it out, or add a task such as gsm8k."
            )
        if unsafe:
            protections()  # raises where there are none: now, not when all is written

    def _check_unsafe(self) -> list[str]:
        unsafe = list(dict.fromkeys(self.unsafe(self.options.tasks)))
        outside = [n for n in unsafe if self._shipped[n].yaml_path.parent.name not in SANDBOXED]
        if outside:
            raise DataError(
                f"{', '.join(outside)}: lm-eval runs what the model writes in a way "
                f"that the sandbox can't replace, so that it isn't run here. Code tasks that are: "
                f"{', '.join(SANDBOXED)}."
            )
        if unsafe and not self.options.confirm_unsafe:
            raise DataError(
                f"{', '.join(unsafe)}: runs programs that the model writes, in a "
                "sandbox (docs/evaluation.md says how far it holds). "
                "Add --confirm-run-unsafe-code if that's what you want."
            )
        return unsafe

    def unsafe(self, names: Sequence[str]) -> list[str]:
        """Return those tasks of the names that run programs that the model writes."""
        leaves = [leaf for name in names for leaf in self.leaves(name)]
        return [leaf for leaf in leaves if (self._shipped[leaf].cfg or {}).get("unsafe_code")]

    def load_again(self, name: str) -> Loaded:
        """Return a task with the data that `check` has found: all models are asked the same.

        Raises:
            DataError: the data aren't there any more, or are others.
        """
        loaded = self.load(name)
        if self._digest(loaded) != self.digests[name]:
            raise DataError(
                f"The data of task {name} have changed since this run began. The same command "
                "again asks all models with the new data."
            )
        return loaded

    def _digest(self, loaded: Loaded) -> Any:  # noqa: ANN401
        """Return what tells the data that were loaded from others.

        Of data sets of the hub their fingerprints, which `datasets` derives from name and revision.
        """
        data = [task.dataset or {} for task in loaded["tasks"].values()]
        local = [splits for splits in data if isinstance(splits, LocalSplits)]
        if local:
            return files_digest(
                (splits.file_of(split) for splits in local for split in splits),
                remember=self.options.cache,
            )
        splits = [split for one in data for split in one.values()]
        return sorted({getattr(split, "_fingerprint", "unknown") for split in splits})

    def leaves(self, name: str) -> list[str]:
        """Return the tasks that a task, a group or a tag stands for.

        Without those that a group writes out in full instead of naming them.
        """
        entry = self._shipped[name]
        if entry.tags and not entry.cfg:
            return [leaf for tagged in sorted(entry.tags) for leaf in self.leaves(tagged)]
        return list(self._members(entry.cfg["task"])) if _is_group(entry.cfg) else [name]

    def _members(self, members: Sequence[Any]) -> Iterator[str]:
        for member in members:
            name = member if isinstance(member, str) else member.get("group", member.get("task"))
            if name in self._shipped:
                yield from self.leaves(name)
            elif not isinstance(member, str) and _is_group(member):  # a group inside a group
                yield from self._members(member["task"])

    def load(self, name: str) -> Loaded:
        """Load a task, a group or a tag.

        Seeds all generators first, as lm-eval does: some tasks shuffle their choices as they load,
        and every model must be asked the same.

        Raises:
            DataError: a file is missing, or the data set can't be had.
        """
        _seed(self.options.seeds)
        leaves = self.leaves(name) if self._folder is not None else []
        try:
            with quiet(), sandboxed_code_eval(), self._only_local(name):
                entries = {leaf: self._with_data(leaf, self.shots(name)) for leaf in leaves}
                with mock.patch.dict(self._manager.task_index, entries):
                    loaded: Loaded = self._manager.load([name])
        except DataError:
            raise
        except Exception as error:  # lm-eval and datasets raise many unrelated types
            advice = "" if self._folder else " With --data-dir DIR it reads local files."
            raise DataError(f"lm-eval can't load task {name}: {reason(error)}.{advice}") from error
        if any(map(writes_text, loaded["tasks"].values())):
            self.writing.add(name)
        return loaded

    def shots(self, name: str) -> int | None:
        """Return the examples that a requested name gets in its prompts; None: lm-eval's number."""
        if self.options.num_fewshot is not None:
            return self.options.num_fewshot
        leaves = set(self.leaves(name))
        fitting = (n for group, n in CUSTOMARY_SHOTS.items() if leaves <= set(self.leaves(group)))
        return next(fitting, None) if leaves else None

    def _only_local(self, name: str) -> AbstractContextManager[Any]:
        """Refuse to download inside the block, if there is a data folder."""
        if self._folder is None:
            return nullcontext()
        import datasets

        def refuse(path: str, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ANN401
            raise DataError(
                f"Task {name} takes {path} from the hub in a way that --data-dir can't replace. "
                "Leave out --data-dir to download."
            )

        return mock.patch.object(datasets, "load_dataset", refuse)

    def _with_data(self, leaf: str, shots: int | None) -> Any:  # noqa: ANN401
        """Return an entry of lm-eval's index that takes its data from the folder.

        lm-eval reads the split of examples even if none is wanted; without its file it isn't told
        of that split, unless examples come from there.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._shipped[leaf]
        config = load_yaml(entry.yaml_path, resolve_func=True)  # imports a task's functions
        assert self._folder is not None
        splits = LocalSplits(self._folder, leaf, config)
        fixed, examples = config.get("num_fewshot"), config.get("fewshot_config") or {}
        wanted = fixed if shots is None or fixed == 0 else shots
        own_source = config.get("fewshot_split") or examples.keys() & {"split", "samples"}
        sources = ["training_split", *(["validation_split"] if config.get("test_split") else [])]
        for key in (key for key in sources if config.get(key) is not None):
            if splits.has(config[key]):
                break
            if wanted and not own_source:
                splits.file_of(config[key])  # raises, and names the file
            config[key] = None
        config["custom_dataset"] = lambda **_settings: splits
        return dataclasses.replace(entry, yaml_path=None, cfg=config)


def writes_text(task: Any) -> bool:  # noqa: ANN401
    """Return whether a model writes the answers of a task, so that `--gen-kwargs` applies."""
    return bool(task.get_config("output_type") == "generate_until")


def _seed(seeds: tuple[int, ...]) -> None:
    """Seed all that tasks and sampled answers draw from."""
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # lm-eval draws from it
    torch.manual_seed(seeds[2])


def _is_group(config: Any) -> bool:  # noqa: ANN401
    return isinstance(config, Mapping) and "group" in config and isinstance(config["task"], list)
