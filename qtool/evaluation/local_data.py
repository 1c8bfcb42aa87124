"""lm-eval's data sets from local files: which file holds which split of which data set.

A row keeps the field names of the data set on the hub, so lm-eval's templates work unchanged. Any
other task reads `TASK/SPLIT.jsonl` in the same folder; all files may be gzipped.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.errors import DataError
from qtool.storage.jsonl import json_lines

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LocalDataset:
    """Where the splits of one data set are, under a data folder."""

    files: Mapping[str, str]
    """File by split, without `.gz`."""
    config_field: str | None = None
    """Field that names the configuration a row belongs to, where one file holds all of them."""
    id_ranges: Mapping[str, range] = field(default_factory=dict)
    """`task_id` by split, where one file holds all splits."""


ARC_EASY = {"validation": "mcqa/arc_easy_val.jsonl", "test": "mcqa/arc_easy_test.jsonl"}
ARC_CHALLENGE = {key: name.replace("easy", "challenge") for key, name in ARC_EASY.items()}
WIKITEXT = {
    "validation": "lm/wikitext2_raw_valid_pages.jsonl",
    "test": "lm/wikitext2_raw_test_pages.jsonl",
}
MMLU = {split: f"mcqa/mmlu_{split}.jsonl" for split in ("dev", "validation", "test")}
OPENBOOKQA = {"validation": "mcqa/openbookqa_val.jsonl", "test": "mcqa/openbookqa_test.jsonl"}
GSM8K = {"train": "math/gsm8k_train.jsonl", "test": "math/gsm8k_test.jsonl"}
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}

DATASETS: Mapping[tuple[str, str | None], LocalDataset] = {
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): LocalDataset(WIKITEXT),
    ("EleutherAI/lambada_openai", "default"): LocalDataset(
        {"test": "lm/lambada_openai_test.jsonl"}
    ),
    ("cais/mmlu", None): LocalDataset(MMLU, config_field="subject"),
    ("Rowan/hellaswag", None): LocalDataset({"validation": "mcqa/hellaswag_val.jsonl"}),
    ("allenai/ai2_arc", "ARC-Easy"): LocalDataset(ARC_EASY),
    ("allenai/ai2_arc", "ARC-Challenge"): LocalDataset(ARC_CHALLENGE),
    ("baber/piqa", None): LocalDataset({"validation": "mcqa/piqa_val.jsonl"}),
    ("allenai/winogrande", "winogrande_xl"): LocalDataset(
        {"validation": "mcqa/winogrande_xl_val.jsonl"}
    ),
    ("aps/super_glue", "boolq"): LocalDataset({"validation": "mcqa/boolq_val.jsonl"}),
    ("allenai/openbookqa", "main"): LocalDataset(OPENBOOKQA),
    ("truthfulqa/truthful_qa", "multiple_choice"): LocalDataset(
        {"validation": "mcqa/truthfulqa.jsonl"}
    ),
    ("openai/gsm8k", "main"): LocalDataset(GSM8K),
    ("openai/openai_humaneval", None): LocalDataset({"test": "code/humaneval.jsonl"}),
    ("google-research-datasets/mbpp", "full"): LocalDataset(
        dict.fromkeys(MBPP_SPLITS, "code/mbpp.jsonl"), id_ranges=MBPP_SPLITS
    ),
}
"""By lm-eval's `dataset_path` and `dataset_name`; a name None: any, one file holds all."""


def find(path: str | None, name: str | None) -> LocalDataset | None:
    """Return what is known of a data set of the hub."""
    return DATASETS.get((path or "", name)) or DATASETS.get((path or "", None))


class LocalSplits(dict[str, Any]):
    """Splits of one task by name, read when they are asked for.

    In place of the `DatasetDict` that lm-eval would download.
    """

    def __init__(self, folder: Path, task: str, path: str | None, name: str | None) -> None:
        super().__init__()
        self.folder, self.task, self.name = folder, task, name
        self.known = find(path, name)

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
            "the data set on the hub, or leave out --data-dir to download."
        )

    def has(self, split: str) -> bool:
        """Return whether the file of a split is there."""
        return self._find(split) is not None

    def _wanted(self, split: str) -> Path:
        known = self.known.files.get(split) if self.known else None
        return self.folder / (known or f"{self.task}/{split}.jsonl")

    def _find(self, split: str) -> Path | None:
        wanted = self._wanted(split)
        candidates = (wanted, wanted.with_name(f"{wanted.name}.gz"))
        return next((file for file in candidates if file.is_file()), None)

    def rows(self, split: str) -> list[Row]:
        """Return the rows of a split."""
        file = self.file_of(split)
        rows = _kept_rows(file, file.stat().st_mtime_ns)
        if self.known and self.known.config_field and self.name is not None:
            rows = [row for row in rows if row.get(self.known.config_field) == self.name]
        if self.known and split in self.known.id_ranges:
            rows = [row for row in rows if row.get("task_id") in self.known.id_ranges[split]]
        if not rows:
            raise DataError(f"{file} holds no row for task {self.task}, split {split}.")
        return rows

    def __missing__(self, split: str) -> Any:  # noqa: ANN401
        from datasets import Dataset  # slow, and comes with the eval extra

        self[split] = Dataset.from_list(self.rows(split))
        return self[split]

    def __deepcopy__(self, memo: dict[int, Any]) -> "LocalSplits":
        return self


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the objects of a .jsonl or .jsonl.gz file; empty lines are none.

    Raises:
        DataError: as `json_lines`, or a line isn't a JSON object.
    """
    for place, row in json_lines(file):
        if not isinstance(row, dict):
            raise DataError(f"{place} isn't a JSON object.")
        yield row


@functools.lru_cache(maxsize=2)
def _kept_rows(file: Path, _changed: int) -> list[Row]:
    """Return all rows of a file: the 57 tasks of mmlu read the same two, one after the other."""
    return list(read_rows(file))
