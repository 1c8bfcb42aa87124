"""Data sets from local files: which file holds what, and what is said if it doesn't."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from qtool.data.local_datasets import DataFolder, LocalSplits
from qtool.errors import DataError
from qtool.storage.digests import files_digest
from qtool.storage.jsonl import json_objects
from tests.task_rows import ITEMS, SHARED, invented, write_all, write_rows, write_table

TASKS = {
    "wikitext": ["lm/wikitext2_raw_test_pages.jsonl"],
    "lambada_openai": ["lm/lambada_openai_test.jsonl"],
    "mmlu": ["mcqa/mmlu_dev.jsonl.gz", "mcqa/mmlu_test.jsonl.gz"],
    "hellaswag": ["mcqa/hellaswag_val.jsonl"],
    "arc_easy": ["mcqa/arc_easy_test.jsonl"],
    "arc_challenge": ["mcqa/arc_challenge_test.jsonl"],
    "piqa": ["mcqa/piqa_val.jsonl"],
    "winogrande": ["mcqa/winogrande_xl_val.jsonl"],
    "boolq": ["mcqa/boolq_val.jsonl"],
    "openbookqa": ["mcqa/openbookqa_test.jsonl"],
    "truthfulqa_mc2": ["mcqa/truthfulqa.jsonl"],
    "gsm8k": ["math/gsm8k_test.jsonl", "math/gsm8k_train.jsonl"],
    "humaneval": ["code/humaneval.jsonl"],
    "mbpp": ["code/mbpp.jsonl"],
}
"""The files that each task reads, where only those are there that it needs."""
NUM_ITEMS = {"mmlu": 61, "arc_challenge": ITEMS - 1, "gsm8k": 4, "humaneval": 4, "mbpp": 3}
ALL_ITEMS = {
    "wikitext": 62,
    "lambada_openai": 5153,
    "mmlu": 14042,
    "hellaswag": 10042,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "piqa": 1838,
    "winogrande": 1267,
    "boolq": 3270,
    "openbookqa": 500,
    "truthfulqa_mc2": 817,
    "gsm8k": 1319,
    "humaneval": 164,
    "mbpp": 500,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def load(data_dir: Path, name: str, num_fewshot: int | None = None):
    """The tasks of a name, and the files that were read."""
    from qtool.evaluation.lm_eval.harness import Tasks
    from qtool.evaluation.lm_eval.options import TaskOptions

    asked = Tasks(TaskOptions(tasks=(name,), data_dir=data_dir, num_fewshot=num_fewshot))
    loaded = list(asked.load(name)["tasks"].values())
    data = [task.dataset for task in loaded]
    return {splits.file_of(split) for splits in data for split in splits}, loaded


def splits_of(folder: Path, task: str, path: str = "", config: str | None = None, **settings: str):
    named = {"dataset_path": path or None, "dataset_name": config, **settings}
    return LocalSplits(DataFolder(folder), task, named)


@pytest.mark.parametrize("name", TASKS)
def test_task_loads_from_local_rows(folder, name):
    files, loaded = load(folder, name)
    assert sorted(str(file.relative_to(folder)) for file in files) == TASKS[name]
    assert sum(len(task.eval_docs) for task in loaded) == NUM_ITEMS.get(name, ITEMS)
    for task in loaded:
        task.build_all_requests(limit=2)
        assert task.instances


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"wikitext", "mbpp"}))
def test_files_are_found_by_obvious_names(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "datasets.json").unlink()
    files, loaded = load(copy, name)
    assert sorted(str(file.relative_to(copy)) for file in files) == TASKS[name]
    assert sum(len(task.eval_docs) for task in loaded) == NUM_ITEMS.get(name, ITEMS)


@pytest.mark.parametrize(
    ("file", "split", "found"),
    [
        ("mcqa/gsm8k_test.jsonl", "test", True),
        ("gsm8k/test.jsonl.gz", "test", True),
        ("x/GSM8K-Test.jsonl", "test", True),
        ("gsm8k.jsonl", "test", True),
        ("gsm8k.jsonl", "train", False),  # its examples would be the questions
        ("gsm8k_val.jsonl", "validation", True),
        ("gsm8k_val.jsonl", "test", False),
        ("my_gsm8k_test.jsonl", "test", False),
        ("gsm8k_test.json", "test", False),
    ],
)
def test_name_of_a_file_says_task_and_split(tmp_path, file, split, found):
    write_rows(tmp_path / file, [{"a": 1}])
    write_rows(tmp_path / "another.jsonl", [{"a": 1}])
    splits = splits_of(tmp_path, "gsm8k", "openai/gsm8k", "main", test_split="test")
    assert splits.has(split) == found


def test_table_decides_over_names(tmp_path):
    write_rows(tmp_path / "gsm8k_test.jsonl", [{"a": 1}])
    write_rows(tmp_path / "other.jsonl.gz", [{"a": 2}])
    table = [{"dataset": "openai/gsm8k", "files": {"test": "other.jsonl"}}]
    (tmp_path / "datasets.json").write_text(json.dumps(table))
    splits = splits_of(tmp_path, "gsm8k", "openai/gsm8k", "main")
    assert splits.rows("test") == [{"a": 2}]
    assert not splits.has("train")


def test_entry_of_the_configuration_comes_before_the_general_one(tmp_path):
    for name in ("any", "own"):
        write_rows(tmp_path / f"{name}.jsonl", [{"from": name}])
    table = [
        {"dataset": "d", "files": {"test": "any.jsonl"}},
        {"dataset": "d", "config": "c", "files": {"test": "own.jsonl"}},
    ]
    (tmp_path / "datasets.json").write_text(json.dumps(table))
    assert splits_of(tmp_path, "t", "d", "c").rows("test") == [{"from": "own"}]
    assert splits_of(tmp_path, "t", "d", "e").rows("test") == [{"from": "any"}]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "Invalid JSON"),
        ("{}", "sets: Input should be a valid array"),
        ("[1]", "0"),
        ('[{"dataset": "d"}]', "0.files Field required"),
        ('[{"dataset": "d", "files": {}, "colour": 1}]', "0.colour"),
        ('[{"dataset": "d", "files": {"test": 3}}]', "0.files.test"),
        ('[{"dataset": "d", "files": {}, "ids": {"test": [1]}}]', "0.ids.test"),
    ],
)
def test_table_of_something_else_is_one_sentence(tmp_path, table, words):
    (tmp_path / "datasets.json").write_text(table)
    with pytest.raises(DataError, match=r"datasets\.json isn't a list of data sets") as caught:
        DataFolder(tmp_path)
    assert words in str(caught.value)
    assert "docs/evaluation.md" in str(caught.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="There is no data folder"):
        DataFolder(tmp_path / "none")


def test_folder_without_data_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"has neither datasets\.json nor a \.jsonl"):
        DataFolder(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("hellaswag", "hellaswag/train.jsonl"),
        ("arc_easy", "arc_easy/train.jsonl"),
        ("lambada_openai", None),
    ],
)
def test_examples_come_from_the_training_split_or_not_at_all(folder, name, missing):
    if missing is None:  # lm-eval takes them from the test split, as it says
        load(folder, name, num_fewshot=1)
        return
    with pytest.raises(DataError, match=missing):
        load(folder, name, num_fewshot=1)


def test_zipped_and_plain_rows_are_equal(tmp_path):
    rows = [{"page": "a\u2028b ✓"}, {"page": ""}]
    write_rows(tmp_path / "plain.jsonl", rows)
    write_rows(tmp_path / "zipped.jsonl.gz", rows)
    assert list(json_objects(tmp_path / "plain.jsonl")) == rows
    assert list(json_objects(tmp_path / "zipped.jsonl.gz")) == rows


def test_plain_file_comes_before_the_zipped_one(tmp_path):
    write_rows(tmp_path / "t/test.jsonl.gz", [{"a": 1}])
    assert splits_of(tmp_path, "t").rows("test") == [{"a": 1}]
    write_rows(tmp_path / "t/test.jsonl", [{"a": 2}])
    assert splits_of(tmp_path, "t").rows("test") == [{"a": 2}]


def test_changed_file_is_read_again(tmp_path):
    import os

    write_rows(tmp_path / "t/test.jsonl", [{"a": 0}])
    splits = splits_of(tmp_path, "t")
    for stamp in (1, 2):
        write_rows(tmp_path / "t/test.jsonl", [{"a": stamp}])
        os.utime(tmp_path / "t/test.jsonl", (stamp, stamp))
        assert splits.rows("test") == [{"a": stamp}]


def test_missing_file_is_named(tmp_path):
    splits = splits_of(write_table(tmp_path), "arc_easy", "allenai/ai2_arc", "ARC-Easy")
    with pytest.raises(DataError) as caught:
        splits["test"]
    message = str(caught.value)
    assert f"{tmp_path}/mcqa/arc_easy_test.jsonl (or .jsonl.gz)" in message
    assert "Task arc_easy reads its test split" in message


@pytest.mark.parametrize("with_table", [True, False])
def test_subject_of_mmlu_is_selected(folder, tmp_path, with_table):
    where = folder if with_table else shutil.copytree(folder / "mcqa", tmp_path / "mcqa").parent

    def rows(name):
        return splits_of(where, "any", "cais/mmlu", name).rows("test")

    assert {row["subject"] for row in rows("astronomy")} == {"astronomy"}
    assert len(rows("astronomy")) == 3
    assert len(rows(None)) == 61
    with pytest.raises(DataError, match="no row for task any, split test"):
        rows("alchemy")


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("prompt", [1, 10]),
        ("test", [11, 12, 510]),
        ("validation", [511, 600]),
        ("train", [601, 974]),
    ],
)
def test_split_of_mbpp_is_selected_by_id(folder, split, ids):
    splits = splits_of(folder, "mbpp", "google-research-datasets/mbpp", "full")
    assert [row["task_id"] for row in splits[split]] == ids


def test_rows_of_mbpp_without_ids_are_none(tmp_path):
    write_rows(tmp_path / "code/mbpp.jsonl", [{"text": "no id"}])
    splits = splits_of(write_table(tmp_path), "mbpp", "google-research-datasets/mbpp", "full")
    with pytest.raises(DataError, match="no row for task mbpp"):
        splits.rows("test")


def test_any_other_task_reads_a_folder_of_its_own(tmp_path):
    write_rows(
        tmp_path / "copa/validation.jsonl.gz",
        [
            {"premise": f"w{i}.", "choice1": "W4", "choice2": "W5", "question": q, "label": i % 2}
            for i, q in enumerate(["cause", "effect"] * 2)
        ],
    )
    files, (task,) = load(tmp_path, "copa")
    assert len(task.eval_docs) == 4
    assert files == {tmp_path / "copa/validation.jsonl.gz"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"a": 1}\n\n{"a": \n', ["line 3", "isn't valid JSON"]),
        ('{"a": 1}\n[1]\n', ["line 2", "isn't a JSON object"]),
        ('{"a": 1}\n3\n', ["line 2", "isn't a JSON object"]),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_line_is_named(tmp_path, lines, words, zipped):
    file = tmp_path / ("t.jsonl.gz" if zipped else "t.jsonl")
    file.write_bytes(gzip.compress(lines.encode()) if zipped else lines.encode())
    with pytest.raises(DataError) as caught:
        list(json_objects(file))
    for word in (str(file), *words):
        assert word in str(caught.value)


def damaged(content: bytes) -> bytes:
    return content[:30] + bytes(9) + content[39:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9]),
        ("t.jsonl.gz", damaged(gzip.compress(json.dumps(list(range(999))).encode(), mtime=0))),
        ("t.jsonl", b'{"a": "\xff"}\n'),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} (can't be read after line|line 1 isn't UTF-8)"):
        list(json_objects(tmp_path / name))


def test_digest_is_of_contents(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, [{"a": 1}])
    write_rows(second, [{"a": 2}])
    before = files_digest([first, second])
    assert files_digest([second, first, first]) == before
    write_rows(second, [{"a": 3}])
    assert files_digest([first, second]) != before


def test_what_cannot_be_local_is_refused_rather_than_downloaded(tmp_path):
    write_rows(tmp_path / "other.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"Task swde takes .* from the hub"):
        load(tmp_path, "swde")


def test_there_is_an_invented_row_of_every_task():
    named = {file for files in TASKS.values() for file in files}
    assert named >= invented().keys()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, which isn't published")
@pytest.mark.parametrize("name", TASKS)
def test_task_loads_all_rows(name, tmp_path):
    """As a folder stands there, or where it can't be written, by a table in a folder of its own."""
    by_name = name not in ("wikitext", "mbpp")
    _, loaded = load(SHARED if by_name else write_table(tmp_path, SHARED), name)
    assert sum(len(task.eval_docs) for task in loaded) == ALL_ITEMS[name]
