"""Build a safetensors file by copying the bytes of others; no tensor is held in memory.

The format is eight bytes of header length, a JSON header, then the data
(https://github.com/huggingface/safetensors, "Format").
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ALIGNMENT = 8
COPY_BYTES = 2**24
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


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
    """Return the tensors of a file that qtool has just written, in the order of their names."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
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


def write_shard(path: Path, pieces: Sequence[Piece]) -> None:
    """Write the pieces into one file, and delete the files that they came from.

    Wide dtypes come first, so that every tensor is aligned to its elements.
    """
    pieces = sorted(pieces, key=lambda piece: -ITEM_BYTES.get(piece.dtype, 1))
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
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            _copy(piece, target)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)
    for source in {piece.file for piece in pieces}:
        source.unlink(missing_ok=True)


def _copy(piece: Piece, target: BinaryIO) -> None:
    """Append the bytes of a piece to an open file."""
    with piece.file.open("rb") as source:
        source.seek(piece.start)
        left = piece.num_bytes
        while left:
            block = source.read(min(left, COPY_BYTES))
            if not block:
                raise OSError(f"{piece.file} ended early")
            target.write(block)
            left -= len(block)
