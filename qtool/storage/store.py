"""What took long and can be made again: one SQLite file in the cache for all of it.

A row is a value under (kind, owner, key): an answer of a model, the scores of a task, the digest of
a file. Each is on disk as soon as it is added, whatever ends the process; several processes may
read and add at once. SQLite doesn't notice a changed bit, so that every row has a checksum. A file
that is damaged, or isn't one of this version, is moved aside and begun anew.
"""

import contextlib
import logging
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qtool.settings import cache_dir

VERSION = 1
"""Of the table; part of the file's name, so that two versions of qtool don't clear each other's."""
WAIT_SECONDS = 20
"""Others hold the file for milliseconds."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (
  kind TEXT, owner TEXT, key BLOB, value BLOB, at REAL, checksum INTEGER,
  PRIMARY KEY (kind, owner, key)
)"""
HELD_BY_OTHERS = {5, 6, 15}
"""BUSY, LOCKED, PROTOCOL: who tries again may get it."""
OF_THE_PLACE = HELD_BY_OTHERS | {3, 7, 8, 10, 13, 14, 18, 22}
"""Results of SQLite that say something of the disk and not of what is in the file: these, PERM,
NOMEM, READONLY, IOERR, FULL, CANTOPEN, TOOBIG, NOLFS."""
_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """What there is of one kind."""

    kind: str
    entries: int
    num_bytes: int
    first: float
    """When the oldest was added, in seconds since 1970."""
    last: float


class Store:
    """The file, opened when it is first needed; it isn't made to be read.

    Methods that add or remove raise `OSError` where the file can't be written; those that read find
    nothing where it can't be read.
    """

    def __init__(self) -> None:
        self.path = cache_dir() / f"store-{VERSION}.sqlite3"
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def read(self, kind: str, owner: str, key: bytes | None = None) -> dict[bytes, bytes]:
        """Return values by key: of one key, or of all of an owner."""
        query = "SELECT key, value, checksum FROM kept WHERE kind = ? AND owner = ?"
        values: tuple[Any, ...] = (kind, owner)
        if key is not None:
            query, values = f"{query} AND key = ?", (*values, key)
        found = self._found(query, values)
        return {k: v for k, v, checksum in found if checksum == _checksum(kind, owner, k, v)}

    def add(self, kind: str, owner: str, rows: Mapping[bytes, bytes]) -> None:
        """Add values by key, all of them or none; they replace what was there."""
        now = time.time()
        values = [(kind, owner, k, v, now, _checksum(kind, owner, k, v)) for k, v in rows.items()]
        self._write("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, ?, ?)", values)

    def remove(self, kind: str, owner: str, keys: Iterable[bytes] | None = None) -> None:
        """Remove some keys of an owner, or all."""
        of_owner = "DELETE FROM kept WHERE kind = ? AND owner = ?"
        if not self.path.exists():
            return
        if keys is None:
            self._write(of_owner, [(kind, owner)])
        else:
            self._write(f"{of_owner} AND key = ?", [(kind, owner, key) for key in keys])

    def summary(self) -> list[Kept]:
        """Return what there is, by kind."""
        of_kind = "count(*), sum(length(value)), min(at), max(at)"
        found = self._found(f"SELECT kind, {of_kind} FROM kept GROUP BY kind")
        return [Kept(kind.decode(errors="replace"), *rest) for kind, *rest in found]

    def clear(self, kinds: Iterable[str]) -> None:
        """Remove all of some kinds, and give their room back to the disk."""
        if self.path.exists():
            self._write("DELETE FROM kept WHERE kind = ?", [(kind,) for kind in kinds])
            self._run(lambda connection: connection.execute("VACUUM"))

    def _write(self, query: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._run(lambda connection: connection.executemany(query, rows))

    def _found(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if not self.path.exists():
            return []
        try:
            return self._run(lambda connection: connection.execute(query, values).fetchall())
        except OSError as error:
            _LOG.warning("%s can't be read: %s.", self.path, error)
            return []

    def _run(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do something with the file in one transaction; if it is damaged, with a new one."""
        try:
            return self._tried(action)
        except sqlite3.ProgrammingError:  # our own mistake
            raise
        except sqlite3.DatabaseError as error:
            if _has_result(error, OF_THE_PLACE):
                raise OSError(str(error)) from error
            self._move_aside(error)
        try:
            return self._tried(action)
        except sqlite3.DatabaseError as error:
            raise OSError(str(error)) from error

    def _tried(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._connection is None:
            self._connection = self._opened()
        with self._connection:  # commits, or takes all of it back
            return action(self._connection)

    def _opened(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Made by SQLite alone: whoever else opens and closes the file drops the locks that this
            # process has on it (https://sqlite.org/howtocorrupt.html, 2.2).
            self._inode = self._inode_now()  # known although opening it may find damage
            connection = _waited_for(str(self.path))
            self._inode = self._inode or self._inode_now()
            return connection
        except (sqlite3.OperationalError, OSError) as error:
            if isinstance(error, sqlite3.Error) and not _has_result(error, OF_THE_PLACE):
                raise
            if not self.path.is_file() or _has_result(error, HELD_BY_OTHERS):
                raise
            # A folder that can't be written: what was finished there can still be read.
            place = f"{self.path.resolve().as_uri()}?mode=ro&immutable=1"
            connection = sqlite3.connect(place, uri=True)
            connection.text_factory = bytes
            return connection

    def _move_aside(self, error: sqlite3.Error) -> None:
        """Give the name to a new file; of a damaged one there is at most one, to look at."""
        _LOG.warning("%s is damaged (%s) and is begun anew.", self.path, error)
        self.__exit__()
        with contextlib.suppress(FileNotFoundError):
            if self._inode_now() == self._inode:  # else another process was faster
                self.path.replace(self.path.with_suffix(".damaged"))
                for end in ("-wal", "-shm", "-journal"):
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)

    def _inode_now(self) -> int:
        """Return that of the file; 0 if there is none."""
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return 0


def _waited_for(place: str) -> sqlite3.Connection:
    """Open or make the file; SQLite itself doesn't wait where several make it at once."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return _connection(place)
        except sqlite3.OperationalError as error:
            if not _has_result(error, HELD_BY_OTHERS) or time.monotonic() > end:
                raise
            time.sleep(0.001)


def _connection(place: str) -> sqlite3.Connection:
    """Open or make the file."""
    connection = sqlite3.connect(place, timeout=WAIT_SECONDS)
    connection.text_factory = bytes  # text that isn't UTF-8 is damage to be found by its checksum
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        # Without WAL, as on some network disks, each row would wait for the disk; a loss of power
        # may then damage the file, which is noticed.
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == b'wal' else 'OFF'}")
        connection.execute("PRAGMA trusted_schema = OFF")
        with connection:
            connection.execute("BEGIN IMMEDIATE")  # of two that find a new file, one waits
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"its version is {version}")
            if version == 0:
                connection.execute(SCHEMA)
                connection.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def _has_result(error: Exception, results: set[int]) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in results


def _checksum(kind: str, owner: str, key: object, value: object) -> int:
    """Return the checksum of a row; -1, which is none, if its types aren't those of ours."""
    if not isinstance(key, bytes) or not isinstance(value, bytes):
        return -1
    return zlib.crc32(b"\0".join((kind.encode(), owner.encode(), key, value)))
