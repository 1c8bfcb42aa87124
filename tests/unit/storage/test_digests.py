"""Digests of files are remembered while the files stay as they are, and not a moment longer."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qtool.storage import digests as file_digests
from qtool.storage.digests import DIGESTS, SETTLED_NS, files_digest
from qtool.storage.store import Store
from qtool.storage.whole_files import written_whole

LONG_AGO = time.time_ns() - 100 * SETTLED_NS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files whose content was read."""
    found: list[Path] = []
    shipped = file_digests._digest

    def digest(file: Path) -> bytes:
        found.append(file)
        return shipped(file)

    monkeypatch.setattr(file_digests, "_digest", digest)
    return found


@pytest.fixture
def later(monkeypatch):
    """Let the clock be far ahead of what the test writes: its files are settled."""
    monkeypatch.setattr("time.time_ns", lambda: time.monotonic_ns() + 2**62)


@pytest.fixture
def files(tmp_path):
    places = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for place in places:
        place.write_bytes(place.name.encode() * 9)
    return places


@pytest.mark.usefixtures("later")
def test_files_that_did_not_change_are_not_read_again(files, read):
    first = files_digest(files)
    assert read == files
    assert files_digest(reversed(files)) == first
    assert read == files
    assert files_digest(files, remember=False) == first
    assert read == files * 2


@pytest.mark.usefixtures("later")
def test_digest_is_that_of_the_contents(files):
    expected = hashlib.sha256()
    for file in files:
        expected.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    assert [files_digest(files) for _ in range(2)] == [expected.hexdigest()] * 2


def same_size(file: Path) -> None:
    file.write_bytes(file.read_bytes()[::-1])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def old_times(file: Path) -> None:
    before = file.stat()
    same_size(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_file(file: Path) -> None:
    before, content = file.stat(), file.read_bytes()
    new = file.with_name("new")
    new.write_bytes(content[::-1])
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(file)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", [same_size, longer, old_times, other_file])
def test_changed_file_is_read_again(files, read, change):
    first = files_digest(files)
    read.clear()
    time.sleep(0.02)  # the clock of the file system ticks every 4 ms or so
    change(files[0])
    assert files_digest(files) != first
    assert read == [files[0]]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("field", range(4))
def test_size_times_and_inode_all_count(files, read, field):
    files_digest(files)
    path = os.fsencode(files[1].resolve())
    with Store() as store:
        state = store.read(DIGESTS, "", path)[path].split(b" ")
        state[field] = b"%d" % (int(state[field]) - 1)
        store.add(DIGESTS, "", {path: b" ".join(state)})
    read.clear()
    files_digest(files)
    assert read == [files[1]]


def test_file_that_changed_a_moment_ago_is_not_remembered(files, read, cache):
    os.utime(files[0], ns=(LONG_AGO, LONG_AGO))  # its ctime says when that was
    for _ in range(2):
        files_digest(files)
    assert read == files * 2
    assert not cache.exists()


@pytest.mark.usefixtures("later")
def test_what_is_remembered_does_not_count_for_a_file_that_changed_a_moment_ago(
    files, read, monkeypatch
):
    files_digest(files)
    read.clear()
    changed = files[0].stat().st_ctime_ns
    monkeypatch.setattr("time.time_ns", lambda: changed + SETTLED_NS)
    files_digest(files[:1])
    assert read == files[:1]


@pytest.mark.usefixtures("later")
def test_file_that_changes_while_it_is_read_is_not_remembered(files, cache, monkeypatch):
    shipped = file_digests._digest

    def digest(file: Path) -> bytes:
        found = shipped(file)
        longer(file)
        return found

    monkeypatch.setattr(file_digests, "_digest", digest)
    files_digest(files)
    assert not cache.exists()


@pytest.mark.usefixtures("later")
def test_links_to_one_file_are_read_once(files, read, tmp_path):
    link = tmp_path / "links" / files[0].name
    link.parent.mkdir()
    link.symlink_to(files[0])
    assert files_digest([link]) == files_digest(files[:1])
    assert len(read) == 1


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"SQLite format 3\0" + b"\xff" * 4096])
def test_damaged_memory_is_none(files, read, content):
    first = files_digest(files)
    with Store() as store:
        store.path.write_bytes(content)
    assert files_digest(files) == first
    assert read == files * 2
    assert files_digest(files) == first
    assert read == files * 2


@pytest.mark.usefixtures("later")
def test_interrupt_keeps_what_was_read(files, read, monkeypatch):
    counting = file_digests._digest

    def stop(file: Path) -> bytes:
        if file == files[1]:
            raise KeyboardInterrupt
        return counting(file)

    monkeypatch.setattr(file_digests, "_digest", stop)
    with pytest.raises(KeyboardInterrupt):
        files_digest(files)
    monkeypatch.setattr(file_digests, "_digest", counting)
    files_digest(files)
    assert read == files


def known() -> list[str]:
    with Store() as store:
        return [os.fsdecode(path) for path in store.read(DIGESTS, "")]


@pytest.mark.usefixtures("later")
def test_files_that_are_gone_are_forgotten(files):
    files_digest(files)
    files[0].unlink()
    longer(files[1])
    files_digest(files[1:])
    assert known() == [str(files[1].resolve())]


@pytest.mark.usefixtures("later")
def test_path_that_cannot_be_looked_at_is_forgotten(files):
    with Store() as store:
        store.add(DIGESTS, "", {b"/" + 300 * b"x": b"1 2 3 4 digest"})
    files_digest(files)
    assert sorted(known()) == [str(file.resolve()) for file in files]


@pytest.mark.usefixtures("later")
def test_cache_that_cannot_be_written_changes_nothing(files, cache):
    expected = files_digest(files, remember=False)
    cache.write_text("a file where the folder would be")
    assert files_digest(files) == expected


@pytest.mark.usefixtures("later")
def test_many_at_once_leave_a_whole_memory(tmp_path):
    places = [tmp_path / f"{index}" for index in range(24)]
    for place in places:
        place.write_text(place.name)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda place: files_digest([place]), places))
    assert set(known()) == {str(place.resolve()) for place in places}


def test_file_is_replaced_whole_or_stays(tmp_path):
    target = tmp_path / "folder" / "file"
    with written_whole(target) as opened:
        opened.write(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(target) as opened:
        opened.write(b"ne")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]
    ordinary: Any = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    assert target.stat().st_mode == ordinary.stat().st_mode
