"""Collections of documents: every kind of source keeps the same promises."""

import gzip
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qtool.data.corpora import Corpus, load_corpus, open_dataset
from qtool.data.documents import Collection
from qtool.errors import DataError, MissingExtraError

ROWS: list[dict[str, Any]] = [
    {"text": "w3 w4 w5", "url": "somewhere"},
    {"messages": [{"role": "user", "content": "w6"}, {"role": "assistant", "content": "w7 w8"}]},
]
HUB = "hub:owner/name:en:validation"


def jsonl(path, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    else:
        path.write_text(lines, encoding="utf-8")
    return str(path)


def opened(name: str) -> Collection:
    collection = open_dataset(name)
    assert isinstance(collection, Collection)
    return collection


@pytest.fixture
def fake_hub(monkeypatch):
    """Put a module in the place of `datasets`; return what it was asked and what it will give."""
    hub = SimpleNamespace(rows=ROWS, asked=[], read=0)

    def load_dataset_builder(name, config, *, revision):
        hub.asked.append((name, config, revision))
        if name == "owner/missing":
            raise FileNotFoundError("Dataset 'owner/missing' doesn't exist\non the hub")
        return SimpleNamespace(hash="c0ffee", as_streaming_dataset=stream)

    def stream(split):
        hub.asked.append(split)
        for row in hub.rows:
            hub.read += 1
            if isinstance(row, Exception):
                raise row
            yield row

    module = SimpleNamespace(
        load_dataset_builder=load_dataset_builder, disable_progress_bars=lambda: None
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


@pytest.fixture(params=["rows.jsonl", "rows.jsonl.gz", "hub"])
def source(request, tmp_path, fake_hub):
    """Return a function rows -> name of a data set of each kind that holds them."""

    def make(rows=ROWS):
        fake_hub.rows = rows
        return HUB if request.param == "hub" else jsonl(tmp_path / request.param, rows)

    return make


def test_texts_and_chats_come_in_order_and_know_their_place(source):
    text, chat = opened(source()).documents
    assert text.content == ROWS[0]["text"]
    assert chat.content == ROWS[1]["messages"]
    assert text.place.endswith(("line 1", "row 1"))
    assert chat.place.endswith(("line 2", "row 2"))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"content": "w3", "id": 1}, r"'content' \(a string\), 'id' \(a number\)"),
        ({"text": None}, r"'text' \(null\)"),
        ({"messages": []}, r"'messages' \(an empty list\)"),
        ({"messages": "w3"}, r"'messages' \(a string\)"),
        ({}, "no fields"),
        (["w3"], "no fields"),
    ],
)
def test_row_without_text_or_messages_names_place_and_allowed_fields(source, row, found):
    documents = opened(source([ROWS[0], row])).documents
    next(documents)  # an error waits until its document is reached
    with pytest.raises(
        DataError, match=rf"(line|row) 2 has {found}\. It must .*'text'.*'messages'"
    ):
        next(documents)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "user"}, "'content' is null"),
        ({"role": "user", "content": None, "name": None}, "'content' is null"),
        ({"role": "user", "content": 3}, "'content' is a number"),
        ({"role": "user", "content": {"text": "w3"}}, "'content' is an object"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "part 1 of 'content'"),
        ({"role": "user", "content": [{"type": "text", "text": "w3"}, None]}, "part 2"),
        ({"content": "w3"}, "no object with 'role'.* found null"),
        ({"role": 3, "content": "w3"}, "no object with 'role'.* found a number"),
        ("w3", "no object with 'role'.* found a string"),
    ],
)
def test_turn_that_is_none_is_named_with_its_key(source, turn, words):
    chat = {"messages": [{"role": "user", "content": "w4"}, turn]}
    with pytest.raises(DataError, match=f"(line|row) 1, turn 2.*{words}"):
        list(opened(source([chat])).documents)


def test_content_in_parts_is_one_text(source):
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}, "!"]
    (chat,) = opened(source([{"messages": [{"role": "user", "content": parts}]}])).documents
    assert chat.content == [{"role": "user", "content": "w3 w4!"}]


def test_file_is_pinned_by_its_digest(tmp_path):
    name = jsonl(tmp_path / "rows.jsonl")
    first, again = (opened(name).origin for _ in range(2))
    assert first == again
    other = opened(jsonl(tmp_path / "rows.jsonl", ROWS[:1])).origin
    assert other.keys() == {"sha256"}
    assert other != first


def test_empty_lines_are_no_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"text": "w3"}\n\n  \n{"text": "w4"}', encoding="utf-8")
    assert [document.place for document in opened(str(path)).documents] == [
        f"{path} line 2",
        f"{path} line 5",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "w3"}\n{"text": ', r"line 2 isn't valid JSON"),
        ("rows.jsonl", "é".encode("latin-1"), "line 1 isn't UTF-8"),
        ("rows.jsonl.gz", b"no gzip", "line 1 isn't valid JSON"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"text": "w3"}\n', mtime=0)[:-9],
            "can't be read after line",
        ),
    ],
)
def test_damaged_file_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(opened(str(tmp_path / name)).documents)


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"No file .*nothing\.jsonl"):
        open_dataset(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="can't be read"):
        open_dataset(str(tmp_path / "folder.jsonl"))


@pytest.mark.parametrize(
    ("name", "asked", "split"),
    [
        ("hub:allenai/c4:en:validation", ("allenai/c4", "en", None), "validation"),
        ("hub:allenai/c4:en", ("allenai/c4", "en", None), "train"),
        ("hub:owner/name", ("owner/name", None, None), "train"),
        ("hub:name::test", ("name", None, None), "test"),
        ("hub:owner/name@c0ffee:en:train", ("owner/name", "en", "c0ffee"), "train"),
    ],
)
def test_hub_name_has_config_split_and_revision(fake_hub, name, asked, split):
    collection = opened(name)
    assert collection.name == name
    assert collection.origin == {"revision": "c0ffee"}
    next(collection.documents)
    assert fake_hub.asked == [asked, split]
    assert fake_hub.read == 1  # streamed: no row before it is wanted


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:a b", "hub:a:b:c:d", "hub:a:b:"])
def test_malformed_hub_name_shows_the_right_form(fake_hub, name):
    with pytest.raises(DataError, match=r"hub:NAME:CONFIG:SPLIT, such as hub:allenai/c4:en:train"):
        open_dataset(name)
    assert not fake_hub.asked


def test_hub_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(MissingExtraError, match=r"hub:a/b needs the 'data' extra.*pip install "):
        open_dataset("hub:a/b")


def test_failing_hub_is_one_sentence(fake_hub):
    with pytest.raises(
        DataError, match=r"didn't give hub:owner/missing: Dataset .* exist on the hub$"
    ):
        open_dataset("hub:owner/missing")
    fake_hub.rows = [ROWS[0], ConnectionError("cable cut")]
    with pytest.raises(DataError, match="stopped giving hub:owner/name: cable cut"):
        list(opened("hub:owner/name").documents)


def test_running_texts_stay_running_texts(text_file):
    assert isinstance(open_dataset(str(text_file)), Corpus)
    assert isinstance(open_dataset("wikitext2-valid"), Corpus)


def test_perplexity_reads_texts_joined_and_says_why_nothing_else(tmp_path):
    name = jsonl(tmp_path / "rows.jsonl", [{"text": "w3"}, {"text": "w4 w5"}])
    assert load_corpus(name) == Corpus("rows.jsonl", "w3\n\nw4 w5")
    with pytest.raises(DataError, match=r"line 2 is a chat, and a running text is needed"):
        load_corpus(jsonl(tmp_path / "chats.jsonl"))
    with pytest.raises(DataError, match=r"hub:a/b is a data set of the hub.*as a \.jsonl file"):
        load_corpus("hub:a/b")
