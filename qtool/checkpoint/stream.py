"""Build a safetensors file by copying the bytes of others; no tensor is held in memory.

The format is eight bytes of header length, a JSON header, then the data
(https://github.com/huggingface/safetensors, "Format").
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qtool.formats._dtypes import item_bytes
from qtool.storage.whole_files import written_whole

ALIGNMENT = 8
COPY_BYTES = 2**24
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file may raise."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one tensor inside a finished safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


def pieces_of(path: Path) -> list[Piece]:
    """Return the tensors of a file that qtool has written, in the order of their names.

    Raises:
        ValueError: the header isn't what qtool writes; also KeyError, TypeError, AttributeError.
    """
    length = _header_end(path) - 8
    with path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [
        Piece(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file=path,
            start=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in sorted(header.items())
    ]


def write_shard(path: Path, pieces: Sequence[Piece], digests: Mapping[str, str]) -> None:
    """Write the pieces into one file, then cut the files that they came from to their headers.

    Wide dtypes come first, so that every tensor is aligned to its elements. The bytes of each must
    have the digest that `digests` has by its name.

    Raises:
        OSError: it can't be written, or a piece has changed on disk.
    """
    pieces = sorted(pieces, key=lambda piece: -item_bytes(piece.dtype))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.num_bytes
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with written_whole(path, durable=True) as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            if _copy(piece, target) != digests[piece.name]:
                raise OSError(f"{piece.name} has changed on disk since it was written")
    for source in {piece.file for piece in pieces}:
        os.truncate(source, _header_end(source))


def put_back(shard: Path, spools: Iterable[Path]) -> None:
    """Give the spool files that a shard was made of their bytes again, and remove the shard.

    A file that can't be mended is left as it is; a damaged shard gives nothing.

    Raises:
        OSError: the system refuses, as where the disk is full: the shard is kept.
    """
    with _damage_ignored():
        stored = {piece.name: piece for piece in pieces_of(shard)}
        for spool in spools:
            with _damage_ignored():
                _fill(spool, stored)
    shard.unlink()


@contextlib.contextmanager
def _damage_ignored() -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:  # not ours, but the system's
            raise


def _fill(spool: Path, stored: Mapping[str, Piece]) -> None:
    missing = sorted(pieces_of(spool), key=lambda piece: piece.start)
    end = _header_end(spool)
    if spool.stat().st_size != end or not all(piece.name in stored for piece in missing):
        return
    header = spool.read_bytes()
    with written_whole(spool, durable=True) as target:
        target.write(header)
        for piece in missing:
            _copy(stored[piece.name], target)


def _header_end(path: Path) -> int:
    """Return where the data begin; ValueError if that is beyond the end of the file."""
    with path.open("rb") as file:
        end = 8 + int.from_bytes(file.read(8), "little")
    if end > path.stat().st_size:
        raise ValueError(f"{path} ends in its header")
    return end


def _copy(piece: Piece, target: IO[bytes]) -> str:
    """Append the bytes of a piece to an open file and return their digest."""
    digest = hashlib.sha256()
    with piece.file.open("rb") as source:
        source.seek(piece.start)
        left = piece.num_bytes
        while left:
            block = source.read(min(left, COPY_BYTES))
            if not block:
                raise OSError(f"{piece.file} ended early")
            target.write(block)
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
