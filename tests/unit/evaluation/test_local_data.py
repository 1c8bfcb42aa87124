"""Data sets from local files: which file holds what, and what is said if it doesn't."""

import gzip
import json
from pathlib import Path

import pytest

from qtool.errors import DataError
from qtool.evaluation.local_data import DATASETS, LocalSplits, find, read_rows
from qtool.storage.digests import files_digest
from tests.task_rows import ITEMS, SHARED, invented, write_all, write_rows

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


def leaves(objects):
    """The tasks in what `Tasks.load` returns."""
    return [task for o in objects for task in (getattr(o, "get_all_tasks", lambda o=o: [o])())]


def load(data_dir: Path, name: str, num_fewshot: int | None = None):
    from qtool.evaluation.harness import Tasks

    tasks = Tasks(data_dir, num_fewshot)
    return tasks, leaves(tasks.load(name))


@pytest.mark.parametrize("name", TASKS)
def test_task_loads_from_local_rows(folder, name):
    tasks, loaded = load(folder, name)
    read = {str(file.relative_to(folder)) for file in tasks.data_files[name]}
    assert sorted(read) == TASKS[name]
    assert sum(len(task.eval_docs) for task in loaded) == NUM_ITEMS.get(name, ITEMS)
    for task in loaded:
        task.build_all_requests(limit=2)
        assert task.instances


def test_the_table_is_of_the_data_sets_of_these_tasks():
    from qtool.evaluation.harness import Tasks

    tasks, used = Tasks(), set()
    for name in TASKS:
        for leaf in tasks.leaves(name):
            path, config = (tasks._config(leaf, k) for k in ("dataset_path", "dataset_name"))
            known = find(path, config)
            assert known is not None, leaf
            used.add(next(key for key, value in DATASETS.items() if value is known))
            splits = [tasks._config(leaf, f"{kind}_split") for kind in ("test", "validation")]
            scored = next(split for split in splits if split)
            examples = tasks._config(leaf, "fewshot_split")
            assert {scored, examples} - {None} <= known.files.keys(), leaf
    assert used == set(DATASETS)


def test_no_other_split_is_claimed():
    """A split in the table is one that lm-eval asks for, or one that selects rows of a file."""
    from qtool.evaluation.harness import Tasks

    tasks = Tasks()
    asked: dict[int, set[str]] = {}
    for name in TASKS:
        for leaf in tasks.leaves(name):
            path, config = (tasks._config(leaf, k) for k in ("dataset_path", "dataset_name"))
            kinds = ("training", "validation", "test", "fewshot")
            named = {tasks._config(leaf, f"{kind}_split") for kind in kinds}
            asked.setdefault(id(find(path, config)), set()).update(named)
    for (path, _), known in DATASETS.items():
        extra = known.files.keys() - asked[id(known)] - known.id_ranges.keys()
        assert extra == ({"validation"} if path == "cais/mmlu" else set()), path


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
    assert list(read_rows(tmp_path / "plain.jsonl")) == rows
    assert list(read_rows(tmp_path / "zipped.jsonl.gz")) == rows


def test_plain_file_comes_before_the_zipped_one(tmp_path):
    write_rows(tmp_path / "t/test.jsonl.gz", [{"a": 1}])
    splits = LocalSplits(tmp_path, "t", None, None)
    assert splits.rows("test") == [{"a": 1}]
    write_rows(tmp_path / "t/test.jsonl", [{"a": 2}])
    assert splits.rows("test") == [{"a": 2}]


def test_changed_file_is_read_again(tmp_path):
    import os

    splits = LocalSplits(tmp_path, "t", None, None)
    for stamp in (1, 2):
        write_rows(tmp_path / "t/test.jsonl", [{"a": stamp}])
        os.utime(tmp_path / "t/test.jsonl", (stamp, stamp))
        assert splits.rows("test") == [{"a": stamp}]


def test_missing_file_is_named(tmp_path):
    splits = LocalSplits(tmp_path, "arc_easy", "allenai/ai2_arc", "ARC-Easy")
    with pytest.raises(DataError) as caught:
        splits["test"]
    message = str(caught.value)
    assert f"{tmp_path}/mcqa/arc_easy_test.jsonl (or .jsonl.gz)" in message
    assert "Task arc_easy reads its test split" in message


def test_subject_of_mmlu_is_selected(folder):
    def rows(name):
        return LocalSplits(folder, "any", "cais/mmlu", name).rows("test")

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
    splits = LocalSplits(folder, "mbpp", "google-research-datasets/mbpp", "full")
    assert [row["task_id"] for row in splits[split]] == ids


def test_rows_of_mbpp_without_ids_are_none(tmp_path):
    write_rows(tmp_path / "code/mbpp.jsonl", [{"text": "no id"}])
    splits = LocalSplits(tmp_path, "mbpp", "google-research-datasets/mbpp", "full")
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
    tasks, (task,) = load(tmp_path, "copa")
    assert len(task.eval_docs) == 4
    assert tasks.data_files["copa"] == [tmp_path / "copa/validation.jsonl.gz"]


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
        list(read_rows(file))
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
        list(read_rows(tmp_path / name))


def test_digest_is_of_contents(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, [{"a": 1}])
    write_rows(second, [{"a": 2}])
    before = files_digest([first, second])
    assert files_digest([second, first, first]) == before
    write_rows(second, [{"a": 3}])
    assert files_digest([first, second]) != before


def test_what_cannot_be_local_is_refused_rather_than_downloaded(tmp_path):
    with pytest.raises(DataError, match=r"Task swde takes .* from the hub"):
        load(tmp_path, "swde")


def test_there_is_an_invented_row_of_every_task():
    named = {file for files in TASKS.values() for file in files}
    assert named >= invented().keys()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, which isn't published")
@pytest.mark.parametrize("name", TASKS)
def test_task_loads_all_rows(name):
    _, loaded = load(SHARED, name)
    assert sum(len(task.eval_docs) for task in loaded) == ALL_ITEMS[name]
