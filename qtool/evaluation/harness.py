"""lm-eval's tasks, found and loaded as this tool needs them: offline, quiet, code in a sandbox.

Nothing of lm-eval is edited. Its index of tasks is a dictionary of configurations; those that are
asked for get `custom_dataset`, lm-eval's own hook for data from elsewhere.
"""

import contextlib
import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from qtool.errors import DataError
from qtool.evaluation.lm_eval_hooks import quiet, require_lm_eval, sandboxed_code_eval, task_manager
from qtool.evaluation.local_data import LocalSplits
from qtool.evaluation.task_names import describe_unknown
from qtool.storage.digests import files_digest

CUSTOMARY_SHOTS: Mapping[str, int] = {"mmlu": 5}
"""Examples in the prompt of a group's tasks, where papers agree and lm-eval sets no number."""
SANDBOXED = ("humaneval", "humaneval_infilling", "mbpp")
"""Folders of lm-eval whose tasks run programs through `code_eval` alone, hence in the sandbox."""
SEEDS = (0, 1234, 1234, 1234)
"""Of python, numpy, torch and the choice of examples: lm-eval's own."""


class Tasks:
    """The tasks that lm-eval knows, with data from a folder if there is one."""

    def __init__(
        self,
        data_dir: Path | None = None,
        num_fewshot: int | None = None,
        seeds: tuple[int, ...] = SEEDS,
    ) -> None:
        require_lm_eval()
        if data_dir is not None and not data_dir.is_dir():
            raise DataError(f"There is no data folder {data_dir}.")
        self.data_dir, self.num_fewshot, self.seeds = data_dir, num_fewshot, seeds
        self._manager = task_manager()
        self._shipped = dict(self._manager.task_index)
        self.data_files: dict[str, list[Path]] = {}
        """Files that were read, by requested task."""
        self.hub_data: dict[str, list[str]] = {}
        """Fingerprints of the splits that came from the hub, by requested task."""
        self.digests: dict[str, Any] = {}
        """What tells the data of a requested task from others, as `check` has found them."""
        self.writing: set[str] = set()
        """Requested tasks in which a model writes text."""

    def check(self, names: Sequence[str], *, confirm_unsafe: bool, remember: bool = True) -> None:
        """Refuse what can't run, before a model is loaded.

        Args:
            names: Tasks, groups or tags of lm-eval.
            confirm_unsafe: Programs that a model wrote may run.
            remember: As of `files_digest`.

        Raises:
            DataError: a name is unknown, a file is missing, or a task runs programs unasked, or
                outside the sandbox.
        """
        for name in names:
            if name not in self._shipped:
                raise DataError(describe_unknown(name, self._shipped))
        unsafe = self.unsafe(names)
        outside = [n for n in unsafe if self._shipped[n].yaml_path.parent.name not in SANDBOXED]
        if outside:
            raise DataError(
                f"{', '.join(dict.fromkeys(outside))}: lm-eval runs what the model writes in a way "
                f"that the sandbox can't replace, so that it isn't run here. Code tasks that are: "
                f"{', '.join(SANDBOXED)}."
            )
        if unsafe and not confirm_unsafe:
            raise DataError(
                f"{', '.join(dict.fromkeys(unsafe))}: runs programs that the model writes, in a "
                "sandbox (docs/evaluation.md says how far it holds). "
                "Add --confirm-run-unsafe-code if that's what you want."
            )
        for name in names:
            self.load(name)
            self.digests[name] = self._digest(name, remember=remember)

    def load_again(self, name: str, *, remember: bool = True) -> list[Any]:
        """Return a task with the data that `check` has found: all models are asked the same.

        Raises:
            DataError: the data aren't there any more, or are others.
        """
        loaded = self.load(name)
        if self._digest(name, remember=remember) != self.digests[name]:
            raise DataError(
                f"The data of task {name} have changed since this run began. The same command "
                "again asks all models with the new data."
            )
        return loaded

    def _digest(self, name: str, *, remember: bool) -> Any:  # noqa: ANN401
        files = self.data_files[name]
        return files_digest(files, remember=remember) if files else self.hub_data[name]

    def unsafe(self, names: Sequence[str]) -> list[str]:
        """Return those tasks of the names that run programs that the model writes."""
        return [n for name in names for n in self.leaves(name) if self._config(n, "unsafe_code")]

    def leaves(self, name: str) -> list[str]:
        """Return the tasks that a task, a group or a tag stands for.

        Without those that a group writes out in full instead of naming them.
        """
        entry = self._shipped[name]
        if entry.tags and not entry.cfg:
            return [leaf for tagged in sorted(entry.tags) for leaf in self.leaves(tagged)]
        if not _is_group(entry.cfg):
            return [name]
        return list(self._members(entry.cfg["task"]))

    def _members(self, members: Sequence[Any]) -> Iterator[str]:
        for member in members:
            name = member if isinstance(member, str) else member.get("group", member.get("task"))
            if name in self._shipped:
                yield from self.leaves(name)
            elif not isinstance(member, str) and _is_group(member):  # a group inside a group
                yield from self._members(member["task"])

    def load(self, name: str) -> list[Any]:
        """Return lm-eval's objects for a name: one group, or tasks.

        Seeds all generators first, as lm-eval does: some tasks shuffle their choices as they load,
        and every model must be asked the same.

        Raises:
            DataError: a file is missing, or the data set can't be had.
        """
        _seed(self.seeds)
        splits = self._local_splits(name)
        index = self._manager.task_index
        try:
            with quiet(), sandboxed_code_eval(), self._only_local(name):
                for leaf in splits:
                    index[leaf] = self._with_data(leaf, splits[leaf], self.shots(name))
                loaded = self._manager.load([name])
        except DataError:
            raise
        except Exception as error:  # lm-eval and datasets raise many unrelated types
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            advice = "" if self.data_dir else " With --data-dir DIR it reads local files."
            raise DataError(f"lm-eval can't load task {name}: {reason}.{advice}") from error
        finally:
            index.update({leaf: self._shipped[leaf] for leaf in splits})
        self.data_files[name] = [s.file_of(key) for s in splits.values() for key in s]
        self.hub_data[name] = _fingerprints(loaded["tasks"].values())
        if any(map(writes_text, loaded["tasks"].values())):
            self.writing.add(name)
        group = loaded.get("groups", {}).get(name)
        return [group] if group is not None else list(loaded["tasks"].values())

    def _local_splits(self, name: str) -> dict[str, LocalSplits]:
        """Return the local data of each task of a name; empty without a data folder."""
        if self.data_dir is None:
            return {}
        return {
            leaf: LocalSplits(
                self.data_dir,
                leaf,
                self._config(leaf, "dataset_path"),
                self._config(leaf, "dataset_name"),
            )
            for leaf in self.leaves(name)
        }

    def shots(self, name: str) -> int | None:
        """Return the examples that a requested name gets in its prompts; None: lm-eval's number."""
        if self.num_fewshot is not None:
            return self.num_fewshot
        leaves = set(self.leaves(name))
        fitting = (n for group, n in CUSTOMARY_SHOTS.items() if leaves <= set(self.leaves(group)))
        return next(fitting, None) if leaves else None

    @contextlib.contextmanager
    def _only_local(self, name: str) -> Iterator[None]:
        """Refuse to download inside the block, if there is a data folder."""
        import datasets

        def refuse(path: str, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ANN401
            raise DataError(
                f"Task {name} takes {path} from the hub in a way that --data-dir can't replace. "
                "Leave out --data-dir to download."
            )

        if self.data_dir is None:
            yield
        else:
            with mock.patch.object(datasets, "load_dataset", refuse):
                yield

    def _with_data(self, leaf: str, splits: LocalSplits, shots: int | None) -> Any:  # noqa: ANN401
        """Return an entry of lm-eval's index that takes its data from `splits`.

        lm-eval reads the split of examples even if none is wanted; without its file it isn't told
        of that split, unless examples come from there.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._shipped[leaf]
        config = load_yaml(entry.yaml_path, resolve_func=True)  # imports a task's functions
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

    def _config(self, leaf: str, key: str) -> Any:  # noqa: ANN401
        return (self._shipped[leaf].cfg or {}).get(key)


def writes_text(task: Any) -> bool:  # noqa: ANN401
    """Return whether a model writes the answers of a task, so that `--gen-kwargs` applies."""
    return bool(task.get_config("output_type") == "generate_until")


def _seed(seeds: tuple[int, ...]) -> None:
    """Seed all that tasks and sampled answers draw from."""
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # lm-eval draws from it
    torch.manual_seed(seeds[2])


def _fingerprints(tasks: Iterable[Any]) -> list[str]:
    """Return what tells the versions of data sets apart; empty if all are local files.

    Of a data set of the hub, `datasets` derives the fingerprint from its name and its revision.
    """
    found = set()
    for task in tasks:
        if not isinstance(task.dataset, LocalSplits):
            splits = (task.dataset or {}).values()
            found |= {getattr(split, "_fingerprint", "unknown") for split in splits}
    return sorted(found)


def _is_group(config: Any) -> bool:  # noqa: ANN401
    return isinstance(config, Mapping) and "group" in config and isinstance(config["task"], list)
