"""Text and JSON lines: read, or one sentence with file and line."""

import gzip
import json
import lzma
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import DataError
from qtool.storage.jsonl import json_lines, json_value, read_text

BOM = b"\xef\xbb\xbf"
ROWS = [{"text": "one"}, {"text": "two"}]
LINES = [json.dumps(row).encode() for row in ROWS]


def values(path, content: bytes) -> list[object]:
    path.write_bytes(content)
    return [value for _, value in json_lines(path)]


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES),
        BOM + b"\r\n".join(LINES) + b"\r\n",
        BOM + LINES[0] + b"\n" + BOM + LINES[1] + b"\n",  # two files, joined
        b"\n\n" + b"\n \t\n".join(LINES),
        gzip.compress(b"\n".join(LINES), mtime=0),
        lzma.compress(b"\n".join(LINES)),
        gzip.compress(BOM + LINES[0] + b"\n", mtime=0) + gzip.compress(LINES[1], mtime=0),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_are_read_however_they_were_saved(tmp_path, name, content):
    assert values(tmp_path / name, content) == ROWS


@pytest.mark.parametrize(
    ("escaped", "meant"),
    [
        (r'"cut \ud83d"', "cut \ufffd"),
        (r'"\uDE00 cut"', "\ufffd cut"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r'"\\ud83d"', r"\ud83d"),
        (r'{"\ud83d": [["\ude00"]]}', {"\ufffd": [["\ufffd"]]}),
        (r'"a\u0000b"', "a\0b"),
    ],
)
def test_half_of_a_surrogate_pair_is_replaced(escaped, meant):
    assert json_value(escaped, "here") == meant


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": ', "isn't valid JSON"),
        (b'{"a": 1} {"a": 2}', "isn't valid JSON"),
        (b'{"a": "\x00"}', "isn't valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested too deeply"),
        (b"9" * 5_000, "thousands of digits"),
        (b'{"a": "\xe9"}', "isn't UTF-8"),
        (b'{"a": "\xed\xa0\xbd"}', "isn't UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "isn't UTF-8"),
    ],
)
def test_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=rf"rows\.jsonl line 3 .*{words}"):
        values(path, LINES[0] + b"\r\n\r\n" + line + b"\n")


XZ = lzma.compress(b"1\n2\n")
DAMAGED = [
    *(b"\x1f\x8b", gzip.compress(b"1\n2\n", mtime=0)[:-9]),
    *(XZ[:6], XZ[:-9], XZ[:30] + b"?" + XZ[31:]),
]


@pytest.mark.parametrize("packed", DAMAGED)
def test_damaged_gzip_or_xz_is_one_sentence(tmp_path, packed):
    with pytest.raises(DataError, match=r"rows\.jsonl can't be read after line \d"):
        values(tmp_path / "rows.jsonl", packed)


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    for name, words in {
        "pipe.jsonl": "no ordinary file",
        "folder.jsonl": "a directory",
        "dangling.jsonl": "No file",
        "x" * 300: "can't be read",
        "a\0b": "can't be read",
    }.items():
        for read in (read_text, lambda path: list(json_lines(path))):
            with pytest.raises(DataError, match=words):
                read(tmp_path / name)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_text_has_plain_line_ends_and_no_marks(tmp_path, newline):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + newline.join([b"one", b"", BOM + b"two", b""]))
    assert read_text(path) == "one\n\ntwo\n"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_text(path) == "one\n\ntwo\n"


def test_text_that_isnt_utf8_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(DataError, match=r"a\.txt line 3 isn't UTF-8"):
        read_text(tmp_path / "a.txt")


def test_text_beyond_its_bound_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    assert len(read_text(tmp_path / "a.txt", most_bytes=11)) == 11
    with pytest.raises(DataError, match="more than 10 bytes"):
        read_text(tmp_path / "a.txt", most_bytes=10)


@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    try:
        values(path, content)
    except DataError as error:
        assert "\n" not in str(error)
