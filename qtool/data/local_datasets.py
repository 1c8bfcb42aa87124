"""lm-eval's data sets from local files: a data folder says which file holds which split.

DIR/datasets.json names the files; what it doesn't name is found by obvious names. Rows keep the
field names of the data set on the hub, so lm-eval's templates work unchanged.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qtool.errors import DataError
from qtool.storage.jsonl import Row, json_objects, read_text

TABLE = "datasets.json"
SHORT_NAMES = {"validation": ("valid", "val")}
"""Of splits, in the names of files."""
CONFIG_FIELDS = ("subject", "subset", "config")
"""What says the configuration of a row, in a file that is named for a whole data set."""
END = re.compile(r"\.jsonl(\.gz)?$")


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LocalDataset:
    """An entry of datasets.json: where the splits of one data set are."""

    dataset: str
    """lm-eval's `dataset_path`, such as cais/mmlu."""
    config: str | None = None
    """Its `dataset_name`; None: any."""
    files: Mapping[str, str]
    """File by split, from the folder on; `.gz` may be left out."""
    config_field: str | None = None
    """Field that names the configuration a row belongs to, where one file holds all."""
    ids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """First and last `task_id` by split, where one file holds all splits."""


ENTRIES = TypeAdapter(tuple[LocalDataset, ...])


class DataFolder:
    """A data folder: the entries of its table, and its files by letters and digits of their names.

    Raises:
        DataError: it isn't there, or its datasets.json isn't one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"There is no data folder {path}.")
        self.path, self.entries = path, _read_table(path / TABLE)
        self.files: dict[str, Path] = {}
        for file in sorted(path.rglob("*.jsonl*"), reverse=True):  # plain files come last, and win
            stem = END.sub("", file.name)
            self.files |= {_letters(file.parent.name + stem): file, _letters(stem): file}
        if not self.files and not self.entries:
            raise DataError(
                f"{path} has neither {TABLE} nor a .jsonl or .jsonl.gz file. Give a folder of task "
                "data, or leave out --data-dir to download."
            )

    def mentions(self, dataset: str, *names: str) -> bool:
        """Return whether the table has a data set, or a file is named for it or for one of these.

        Args:
            dataset: lm-eval's `dataset_path`.
            names: Of tasks or configurations.
        """
        wanted = [_letters(name) for name in (dataset.rpartition("/")[2], *names)]
        named = any(one in file for one in wanted for file in self.files)
        return named or any(entry.dataset == dataset for entry in self.entries)


class LocalSplits(dict[str, Any]):
    """Splits of one task by name, read when they are asked for.

    In place of the `DatasetDict` that lm-eval would download.
    """

    def __init__(self, folder: DataFolder, task: str, config: Mapping[str, Any]) -> None:
        """Take the configuration that lm-eval has of a task."""
        super().__init__()
        self.folder, self.task = folder, task
        self.dataset, self.config = config.get("dataset_path") or "", config.get("dataset_name")
        self.scored = config.get("test_split") or config.get("validation_split")
        entries = [
            e
            for e in folder.entries
            if e.dataset == self.dataset and e.config in (self.config, None)
        ]
        self.entry = min(entries, key=lambda entry: entry.config is None, default=None)

    def file_of(self, split: str) -> Path:
        """Return the file of a split.

        Raises:
            DataError: there is no such file.
        """
        found = self._find(split)
        if found is not None:
            return found
        raise DataError(
            f"Task {self.task} reads its {split} split from {self._wanted(split)} (or .jsonl.gz), "
            "which isn't there. Put the file there, one JSON object a line with the field names of "
            f"the data set on the hub; or name another in {self.folder.path / TABLE}: "
            f'[{{"dataset": "{self.dataset}", "files": {{"{split}": "FILE"}}}}]; or leave out '
            "--data-dir to download."
        )

    def has(self, split: str) -> bool:
        """Return whether the file of a split is there."""
        return self._find(split) is not None

    def _wanted(self, split: str) -> Path:
        named = self.entry.files.get(split) if self.entry else None
        return self.folder.path / (named or f"{self.task}/{split}.jsonl")

    def _find(self, split: str) -> Path | None:
        """Return the file that the table names, else one named for its content.

        Such as mmlu_test.jsonl.gz or mmlu/test.jsonl, for the task, its configuration or its data
        set; the name alone, as in humaneval.jsonl, is that of the split that is scored.
        """
        wanted = self._wanted(split)
        files = [wanted, wanted.with_name(f"{wanted.name}.gz")]
        if self.entry is None:
            ends = [split, *SHORT_NAMES.get(split, ()), *([""] if split == self.scored else [])]
            subjects = [self.task, *filter(None, (self.config, self._name))]
            names = [_letters(subject + end) for subject in subjects for end in ends]
            files += [self.folder.files[name] for name in names if name in self.folder.files]
        return next((file for file in files if file.is_file()), None)

    @property
    def _name(self) -> str:
        return self.dataset.rpartition("/")[2]

    def rows(self, split: str) -> list[Row]:
        """Return the rows of a split.

        Raises:
            DataError: the file isn't there or can't be read, or has no such row.
        """
        file, entry = self.file_of(split), self.entry
        rows = _kept_rows(file, file.stat().st_mtime_ns)
        names = (
            [entry.config_field] if entry else [n for n in CONFIG_FIELDS if rows and n in rows[0]]
        )
        whole = entry or (self.task != self._name and file.name.startswith(self._name))
        if whole and names and names[0] and self.config is not None:
            rows = [row for row in rows if row.get(names[0]) == self.config]
        if entry and split in entry.ids:
            first, last = entry.ids[split]
            rows = [row for row in rows if row.get("task_id") in range(first, last + 1)]
        if not rows:
            raise DataError(f"{file} holds no row for task {self.task}, split {split}.")
        return rows

    def __missing__(self, split: str) -> Any:  # noqa: ANN401
        from datasets import Dataset  # slow, and comes with the eval extra

        self[split] = Dataset.from_list(self.rows(split))
        return self[split]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LocalSplits":
        return self


def _read_table(file: Path) -> tuple[LocalDataset, ...]:
    try:
        return ENTRIES.validate_json(read_text(file), strict=True) if file.exists() else ()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file} isn't a list of data sets: {place}{place and ' '}{first['msg']}. "
            'Write it as [{"dataset": "cais/mmlu", "files": {"test": "mmlu_test.jsonl"}}]; '
            "docs/evaluation.md has all keys."
        ) from error


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@functools.lru_cache(maxsize=2)
def _kept_rows(file: Path, _changed: int) -> list[Row]:
    """Return all rows of a file: the 57 tasks of mmlu read the same two, one after the other."""
    return list(json_objects(file))
