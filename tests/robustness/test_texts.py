"""Texts, documents, task data and lengths as people have them: read, or one line."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from qtool.data.calibration import draw_samples
from qtool.data.corpora import load_corpus, open_dataset
from qtool.data.lengths import match_lengths, read_lengths
from qtool.data.local_datasets import DataFolder, LocalSplits
from qtool.modeling.load import load_tokenizer
from tests import families
from tests.robustness.child import run_apart
from tests.robustness.fuzzing import Change, fuzz, sizes
from tests.robustness.values import changed_trees, damaged, json_bytes

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} "
    "{% for call in turn.get('tool_calls') or [] %}{{ call['function']['name'] }} {% endfor %}"
    "{% endfor %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "w7", "arguments": '{"a": 1}'}}
CHAT = {
    "messages": [
        {"role": "system", "content": "w3 w4"},
        {"role": "user", "content": [{"type": "text", "text": "w5 w6"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "w8", "tool_call_id": "1"},
        {"role": "assistant", "content": families.text(40)},
    ]
}
TEXTS = [{"text": families.text(40, seed)} for seed in range(3)]
ROWS = [*TEXTS, CHAT]
TASK_ROWS = [{"question": f"w{n} w4", "answer": "w5 #### 7"} for n in range(4)]
ODD_LINES = (
    *(b"", b" ", b"\x00", b"null", b"5", b"[]", b"{}", b'"w3"', b"{", b"nan", b"{'text': 'w3'}"),
    *(b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": ""}', b'{"text": " "}'),
    *(b'{"text": "a", "text": "b"}', b'{"text": "w3\\u0000w4"}', b'{"text": "\xff"}', b"\xff"),
    *(b'{"text": "\xed\xa0\xbd"}', b"[" * 100_000, b'{"a": ' * 3000 + b"1" + b"}" * 3000),
    *(b'{"text": "w3", "n": ' + b"9" * 5000 + b"}", b'{"text": "w3", "n": NaN}', b"\xef\xbb\xbf"),
    *(b'\xef\xbb\xbf{"text": "w3"}', b'{"text": "\xe2\x80\xa8w3\xc2\x85w4\x0c"}', b'{"text": 5}'),
    *(b'{"messages": []}', b'{"messages": [null]}', b'{"messages": {"role": "user"}}'),
    *(b'{"text": null, "messages": [{"role": "user", "content": "w3"}]}', b'{"text": ["w3"]}'),
    b'{"question": "w3", "answer": "' + b"w4 " * 100_000 + b'"}',
)
GENTLE = (
    ("a byte order mark", lambda content: b"\xef\xbb\xbf" + content),
    ("Windows lines", lambda content: content.replace(b"\n", b"\r\n")),
    ("both", lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")),
    ("empty lines", lambda content: content.replace(b"\n", b"\n\n")),
    ("no last line break", lambda content: content.rstrip(b"\n")),
)
"""What changes nothing of what a file of JSON lines says."""


def lines_of(rows: Any) -> bytes:
    """Return rows as JSON lines; rows that aren't a list any more are one line."""
    rows = rows if isinstance(rows, list) else [rows]
    return b"".join(json_bytes(row) + b"\n" for row in rows)


@st.composite
def json_lines(draw: st.DrawFn, rows: list[Any], name: str) -> Change:
    """Draw a file of JSON lines: odd values, odd lines, damaged bytes, or gentle changes."""
    good = lines_of(rows)
    kind = draw(st.sampled_from(["rows", "rows", "lines", "lines", "bytes", "gentle", "gzip"]))
    if kind == "rows":
        what, changed = draw(changed_trees(rows))
        return Change(what, {name: lines_of(changed)}, keeps_values=False)
    if kind == "lines":
        line = draw(st.sampled_from(ODD_LINES))
        lines = good.splitlines(keepends=True)
        lines.insert(draw(st.integers(0, len(lines))), line + b"\n")
        return Change(f"line {line[:60]!r}", {name: b"".join(lines)}, keeps_values=False)
    if kind == "gentle":
        what, change = draw(st.sampled_from(GENTLE))
        return Change(what, {name: change(good)})
    if kind == "bytes":
        what, content = draw(damaged(good))
        return Change(what, {name: content}, keeps_values=False)
    what, content = draw(damaged(gzip.compress(good, mtime=0)))
    return Change(f"gzip: {what}", {name: None, f"{name}.gz": content}, keeps_values=False)


def running_texts(name: str) -> st.SearchStrategy[Change]:
    """Draw a text file."""
    good = "\n".join(families.text(9, seed) for seed in range(30)).encode() + b"\n"
    odd = st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass"))
    pieces = st.sampled_from([b"\x00", b"\xff", b"\xed\xa0\xbd", b"\x1a", b"<s>", b"\x85"]) | odd
    mixed = st.lists(pieces, max_size=4).map(
        lambda found: Change(
            f"with {found!r:.80}", {name: good + b" ".join(found) + good}, keeps_values=False
        )
    )
    gentle = st.sampled_from(GENTLE).map(lambda one: Change(one[0], {name: one[1](good)}))
    broken = damaged(good).map(lambda drawn: Change(drawn[0], {name: drawn[1]}, keeps_values=False))
    return gentle | mixed | broken


@pytest.fixture(scope="module")
def tokenizer(llama):
    found = load_tokenizer(llama)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def sampled(change: Change, empty: Path, target: Path, tokenizer: Any) -> Any:
    """Return the samples of a changed file, or what is wrong with them."""
    directory = change.applied(empty, target)
    name = next(name for name, content in change.files.items() if content is not None)
    texts = open_dataset(str(directory / name))
    drawn = draw_samples(tokenizer, texts, [8, 24, 16])
    tokens = [token for sample in drawn.samples for token in sample.tolist()]
    if not all(0 <= token < families.VOCABULARY for token in tokens):
        return "tokens that the model doesn't have"
    if [len(sample) for sample in drawn.samples] != [8, 24, 16][: len(drawn.samples)]:
        return "samples of other lengths"
    json.dumps(dict(drawn.provenance), allow_nan=False)
    if name.endswith(".txt"):
        load_corpus(str(directory / name)).text.encode()
    return tokens


def check_samples(good: bytes, name: str, empty: Path, target: Path, tokenizer: Any):
    """Return the check of one changed file of texts."""
    sampled(Change("words", {"words.txt": b"w3 " * 99}), empty, target, tokenizer)  # imports
    expected = run_apart(sampled, Change("nothing", {name: good}), empty, target, tokenizer)
    assert expected.complaint is None

    def check(change: Change) -> str | None:
        outcome = run_apart(sampled, change, empty, target, tokenizer)
        if outcome.complaint or isinstance(outcome.value, str):
            return outcome.complaint or outcome.value
        if change.keeps_values and outcome.value != expected.value:
            return f"a gentle change: {outcome.text[:99] or 'other tokens'}"
        return None

    return check


@sizes(15)
@pytest.mark.parametrize("rows", [ROWS, [CHAT]], ids=["texts", "chat"])
def test_documents_are_read_or_refused(size, rows, tokenizer, empty, tmp_path):
    check = check_samples(lines_of(rows), "x.jsonl", empty, tmp_path / "changed", tokenizer)
    fuzz(json_lines(rows, "x.jsonl"), check, size)


@sizes(15)
def test_running_texts_are_read_or_refused(size, tokenizer, empty, tmp_path):
    good = "\n".join(families.text(9, seed) for seed in range(30)).encode() + b"\n"
    check = check_samples(good, "x.txt", empty, tmp_path / "changed", tokenizer)
    fuzz(running_texts("x.txt"), check, size)


def task_rows(change: Change, empty: Path, target: Path) -> Any:
    """Return the rows of a task's data."""
    folder = change.applied(empty, target)
    named = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}
    rows = LocalSplits(DataFolder(folder), "gsm8k", named).rows("test")
    if not all(isinstance(row, dict) for row in rows):
        return "rows that are no objects"
    json.dumps(rows).encode()
    return rows


@sizes(15)
def test_task_data_is_read_or_refused(size, empty, tmp_path):
    def check(change: Change) -> str | None:
        outcome = run_apart(task_rows, change, empty, tmp_path / "changed")
        if outcome.complaint or isinstance(outcome.value, str):
            return outcome.complaint or outcome.value
        same = not change.keeps_values or outcome.value == TASK_ROWS
        return None if same else f"a gentle change: {outcome.text or outcome.value!r:.100}"

    fuzz(json_lines(copy.deepcopy(TASK_ROWS), "math/gsm8k_test.jsonl"), check, size)


NUMBERS = (
    *("12", "512", "0", "-1", "1.5", "1e3", "", "x", "٣", "1_0", "9" * 5000, "12,13", "+5", "#"),
    *("99999999999999999999", "\x00", "\ufeff12", "\ud83d", "0x10", "nan", "12 13", "\t7"),
)


def matched(content: bytes, file: Path) -> str | None:
    """Read lengths and draw samples like them."""
    file.write_bytes(content)
    wanted = read_lengths(file)
    lengths = match_lengths(wanted, num_tokens=4096, longest=512, seed=0)
    return None if all(1 <= length <= 512 for length in lengths) else f"lengths {lengths[:9]}"


@sizes(10)
def test_lengths_are_read_or_refused(size, tmp_path):
    good = b"12\n512\n33\n"
    lines = st.lists(st.sampled_from(NUMBERS), max_size=5).map(
        lambda found: "\n".join(found).encode("utf-8", "surrogatepass")
    )
    broken = damaged(good).map(lambda drawn: drawn[1])

    def check(content: bytes) -> str | None:
        outcome = run_apart(matched, content, tmp_path / "lengths.txt")
        return outcome.complaint or outcome.value

    fuzz(lines | broken, check, size)
