"""Data for lm-eval's tasks: invented rows in the shape of each data set, and a real sample."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.families import text
from tests.helpers import ROOT

SAMPLE = ROOT / "tests" / "data"
"""Rows of MMLU, GSM8K and HumanEval; see the README there."""
SHARED = ROOT.parent / "shared" / "data"
"""All rows of all data sets, on machines that have them."""
ITEMS = 7
DATASETS: list[dict[str, Any]] = [
    {
        "dataset": "EleutherAI/wikitext_document_level",
        "files": {
            "validation": "lm/wikitext2_raw_valid_pages.jsonl",
            "test": "lm/wikitext2_raw_test_pages.jsonl",
        },
    },
    {
        "dataset": "cais/mmlu",
        "files": {split: f"mcqa/mmlu_{split}.jsonl" for split in ("dev", "validation", "test")},
        "config_field": "subject",
    },
    {
        "dataset": "allenai/ai2_arc",
        "config": "ARC-Easy",
        "files": {"validation": "mcqa/arc_easy_val.jsonl", "test": "mcqa/arc_easy_test.jsonl"},
    },
    {
        "dataset": "google-research-datasets/mbpp",
        "config": "full",
        "files": dict.fromkeys(["prompt", "test", "validation", "train"], "code/mbpp.jsonl"),
        "ids": {
            "prompt": [1, 10],
            "test": [11, 510],
            "validation": [511, 600],
            "train": [601, 974],
        },
    },
]
"""What obvious names don't say; of mmlu and ARC also what they do."""

Row = dict[str, Any]


def lettered(count: int, **fields: str) -> list[Row]:
    """Return rows of the shape of ARC and OpenBookQA; `fields` has the name of the question."""
    (question,) = fields.values()
    return [
        {
            "id": f"q{index}",
            question: text(5 + index % 4, seed=index),
            "choices": {
                "text": [text(1 + (index + k) % 3, seed=10 * index + k) for k in range(4)],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "ABCD"[index % 4],
        }
        for index in range(count)
    ]


def hellaswag(index: int) -> Row:
    start = text(6 + index % 3, seed=index)
    return {
        "ind": index,
        "activity_label": text(2, seed=100 + index),
        "ctx_a": start,
        "ctx_b": "",
        "ctx": start,
        "endings": [text(2 + k % 3, seed=20 * index + k) for k in range(4)],
        "source_id": f"invented~{index}",
        "split_type": "indomain",
        "label": str(index % 4),
    }


def truthfulqa(index: int) -> Row:
    choices = [text(2, seed=30 * index + k) for k in range(4)]
    return {
        "question": text(6, seed=index),
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
    }


def mbpp(task_id: int) -> Row:
    return {
        "task_id": task_id,
        "text": "Write a function that adds.",
        "code": "def add(a, b):\n    return a + b",
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"],
        "challenge_test_list": [],
    }


def invented() -> Mapping[str, Sequence[Row]]:
    """Return rows by file."""
    some = range(ITEMS)
    arc = {"question": "question"}
    pairs = [{"goal": text(5, i), "sol1": text(2, 50 + i), "sol2": text(3, 60 + i)} for i in some]
    return {
        "lm/wikitext2_raw_test_pages.jsonl": [{"page": text(30 + 9 * i, i)} for i in some],
        "lm/lambada_openai_test.jsonl": [{"text": text(9 + i, i)} for i in some],
        "mcqa/hellaswag_val.jsonl": [hellaswag(i) for i in some],
        "mcqa/arc_easy_test.jsonl": lettered(ITEMS, **arc),
        "mcqa/arc_challenge_test.jsonl": lettered(ITEMS - 1, **arc),
        "mcqa/piqa_val.jsonl": [{**row, "label": i % 2} for i, row in enumerate(pairs)],
        "mcqa/winogrande_xl_val.jsonl": [
            {"sentence": "w3 _ w9", "option1": "w4", "option2": "w5", "answer": str(1 + i % 2)}
            for i in some
        ],
        "mcqa/boolq_val.jsonl": [
            {"passage": text(9, i), "question": text(3, 70 + i), "label": i % 2} for i in some
        ],
        "mcqa/openbookqa_test.jsonl": lettered(ITEMS, stem="question_stem"),
        "mcqa/truthfulqa.jsonl": [truthfulqa(i) for i in some],
        "code/mbpp.jsonl": [mbpp(i) for i in (1, 10, 11, 12, 510, 511, 600, 601, 974)],
    }


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as lines of JSON, gzipped if the name ends so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())


def write_table(folder: Path, data: Path | None = None) -> Path:
    """Write a folder's datasets.json, whose files may be in another folder."""
    table: list[Row] = [
        {**entry, "files": {k: str((data or Path()) / v) for k, v in dict(entry["files"]).items()}}
        for entry in DATASETS
    ]
    (folder / "datasets.json").write_text(json.dumps(table))
    return folder


def write_all(folder: Path) -> Path:
    """Fill a data folder with the invented rows, the sample and a table."""
    write_table(folder)
    for name, rows in invented().items():
        write_rows(folder / name, rows)
    for file in SAMPLE.glob("*/*.jsonl*"):
        copy = folder / file.relative_to(SAMPLE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return folder
