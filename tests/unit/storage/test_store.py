"""The store: what is added is on disk at once, and no state of the disk ends a run."""

import multiprocessing
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.storage import store as store_module
from qtool.storage.store import Store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def add(**rows: bytes) -> Path:
    with Store() as store:
        store.add("kind", "owner", {key.encode(): value for key, value in rows.items()})
        return store.path


def read() -> dict[bytes, bytes]:
    with Store() as store:
        return store.read("kind", "owner")


@given(rows=st.dictionaries(st.binary(), st.binary(), max_size=4))
def test_rows_read_back(rows):
    with Store() as store:
        store.remove("kind", "owner")
        store.add("kind", "owner", rows)
        assert store.read("kind", "owner") == rows
        assert store.read("kind", "other") == store.read("other", "owner") == {}
    assert read() == rows


def test_one_key_is_read_replaced_and_removed():
    add(a=b"1", b=b"2")
    add(a=b"3")
    with Store() as store:
        assert store.read("kind", "owner", b"a") == {b"a": b"3"}
        assert store.read("kind", "owner", b"c") == {}
        store.remove("kind", "owner", [b"a"])
    assert read() == {b"b": b"2"}


def test_reading_and_removing_make_no_file(cache):
    with Store() as store:
        assert store.read("kind", "owner") == {}
        assert store.summary() == []
        store.remove("kind", "owner")
        store.clear(["kind"])
    assert not cache.exists()


def test_row_is_on_disk_before_the_store_is_closed():
    with Store() as store:
        store.add("kind", "owner", {b"a": b"1"})
        assert read() == {b"a": b"1"}


def test_rows_are_added_together_or_not_at_all():
    with Store() as store:
        store.add("kind", "owner", {b"a": b"1"})
        with pytest.raises(sqlite3.Error):
            store.add("kind", "owner", {b"b": b"2", b"c": object()})  # type: ignore[dict-item]
    assert read() == {b"a": b"1"}


def test_summary_counts_and_clear_gives_room_back():
    path = add(a=b"x" * 1_000_000, b=b"yy")
    with Store() as store:
        store.add("other", "", {b"k": b"v"})
    large = path.stat().st_size
    with Store() as store:
        kind, other = store.summary()
        assert (kind.kind, kind.entries, kind.num_bytes) == ("kind", 2, 1_000_002)
        assert (other.kind, other.entries) == ("other", 1)
        assert 0 < kind.first <= kind.last <= other.last
        store.clear(["kind"])
        assert [one.kind for one in store.summary()] == ["other"]
    assert path.stat().st_size < large / 10


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"SQLite format 3\0" + bytes(84), b"\xff" * 9000, b"x" * 50]
)
def test_file_of_something_else_is_moved_aside(cache, content, caplog):
    path = add(a=b"1")
    path.write_bytes(content)
    assert read() == {}
    add(b=b"2")
    assert read() == {b"b": b"2"}
    if content:
        assert "is damaged" in caplog.text
        assert path.with_suffix(".damaged").read_bytes() == content
    assert {file.name for file in cache.iterdir()} <= {path.name, f"{path.stem}.damaged"}


def test_page_that_is_damaged_is_found_late_and_survived():
    path = add(**{f"k{number}": bytes(3000) for number in range(50)})
    content = bytearray(path.read_bytes())
    content[2 * 4096 : -4096] = b"\xff" * (len(content) - 3 * 4096)
    path.write_bytes(content)
    assert read() == {}
    add(b=b"2")
    assert read() == {b"b": b"2"}


def test_damage_to_a_file_that_this_store_made_is_survived(cache):
    with Store() as store:
        store.add("kind", "owner", {b"a": b"1"})
        with sqlite3.connect(store.path) as other:
            other.execute("DROP TABLE kept")
        other.close()
        store.add("kind", "owner", {b"b": b"2"})
        assert store.read("kind", "owner") == {b"b": b"2"}
    assert len(list(cache.glob("*.damaged"))) == 1


def test_changed_bit_costs_one_row():
    path = add(a=b"first value", b=b"second value")
    content = path.read_bytes()
    assert content.count(b"first value") == 1
    path.write_bytes(content.replace(b"first value", b"first vblue"))
    assert read() == {b"b": b"second value"}


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE kept",
        "ALTER TABLE kept DROP COLUMN at",
        "PRAGMA user_version = 99",
        "DROP TABLE kept; CREATE VIEW kept AS SELECT 1",
    ],
)
def test_other_tables_are_begun_anew(change):
    path = add(a=b"1")
    with sqlite3.connect(path) as connection:
        connection.executescript(change)
    connection.close()
    add(b=b"2")
    assert read()[b"b"] == b"2"


def test_row_of_other_types_is_none():
    path = add(a=b"1")
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO kept VALUES ('kind', 'owner', 7, 'x', 0, NULL)")
        connection.execute("INSERT INTO kept VALUES ('kind', 'owner', x'00', NULL, 0, 3)")
    connection.close()
    assert read() == {b"a": b"1"}


def test_folder_that_cannot_be_made_is_an_os_error(cache):
    cache.write_text("a file where the folder would be")
    with pytest.raises(OSError, match="exists"):
        add(a=b"1")
    assert read() == {}


def test_full_disk_is_an_os_error_and_what_was_there_stays(monkeypatch):
    add(a=b"1")
    shipped = store_module._connection

    def small(place: str) -> sqlite3.Connection:
        connection = shipped(place)
        connection.execute("PRAGMA max_page_count = 8")
        return connection

    monkeypatch.setattr(store_module, "_connection", small)
    with pytest.raises(OSError, match="full"):
        add(b=bytes(100_000))
    assert read() == {b"a": b"1"}


def test_file_that_another_process_holds_is_waited_for_and_then_an_os_error(monkeypatch):
    monkeypatch.setattr(store_module, "WAIT_SECONDS", 0.05)
    path = add(a=b"1")
    other = sqlite3.connect(path, isolation_level=None)
    with Store() as store:
        assert store.read("kind", "owner") == {b"a": b"1"}
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match="locked"):
            store.add("kind", "owner", {b"b": b"2"})
        assert store.read("kind", "owner") == {b"a": b"1"}
        other.execute("ROLLBACK")
        store.add("kind", "owner", {b"b": b"2"})
    other.close()
    assert len(read()) == 2


def test_folder_that_cannot_be_written_is_read(monkeypatch):
    add(a=b"1")

    def refuse(_place: str) -> sqlite3.Connection:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        raise error

    monkeypatch.setattr(store_module, "_connection", refuse)
    assert read() == {b"a": b"1"}
    with pytest.raises(OSError, match="readonly"):
        add(b=b"2")


def test_disk_without_shared_memory_is_enough(monkeypatch):
    """Where the log ahead of writing isn't to be had, SQLite keeps another mode and says so."""
    shipped = sqlite3.connect

    class Plain(sqlite3.Connection):
        def execute(self, query, *values):
            return super().execute(query.replace("journal_mode = WAL", "journal_mode"), *values)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: shipped(*a, factory=Plain, **k))
    path = add(a=b"1")
    assert read() == {b"a": b"1"}
    assert not path.with_name(f"{path.name}-wal").exists()


def add_one(number: int) -> None:
    with Store() as store:
        store.add("kind", "owner", {b"%d" % number: b"v"})
        assert b"%d" % number in store.read("kind", "owner")


def test_many_threads_add_at_once():
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(40)))
    assert len(read()) == 40


def test_many_threads_make_the_file_at_once(tmp_path, monkeypatch, caplog):
    with ThreadPoolExecutor(8) as pool:
        for place in range(100):
            monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / f"{place}"))
            list(pool.map(add_one, range(12)))
            assert len(read()) == 12
    assert not caplog.records


def test_file_that_is_held_while_it_is_opened_is_waited_for(monkeypatch):
    path = add(a=b"1")
    shipped, tries = store_module._connection, []

    def busy_at_first(place: str) -> sqlite3.Connection:
        tries.append(place)
        if len(tries) < 3:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error
        return shipped(place)

    monkeypatch.setattr(store_module, "_connection", busy_at_first)
    add(b=b"2")
    assert tries == [str(path)] * 3
    assert len(read()) == 2


def test_many_processes_add_at_once():
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(add_one, range(12))
    assert len(read()) == 12
