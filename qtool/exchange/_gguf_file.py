"""A GGUF file: its header, checked, and the bytes of one tensor at a time.

Specified in ggml/docs/gguf.md of llama.cpp; versions 2 and 3, little-endian. A tensor's bytes are
read when they are asked for, so that a file of any size takes the memory of one tensor.
"""

import contextlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.errors import CheckpointError
from qtool.wording import reason, shown

GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
GGUF_ALIGNMENT = 32
STRING, ARRAY, BOOLEAN = 8, 9, 7
GGUF_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f",
    BOOLEAN: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""How a value is stored, by the number of its type."""
GGML_DIMENSIONS = 4
LONGEST_GGUF_NAME = 2**16


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How a tensor's values are stored: in blocks along its rows."""

    name: str
    block_size: int
    """Weights of a block; 1: plain values."""
    block_bytes: int


GGML_TYPES = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    30: GgmlType("BF16", 1, 2),
}
"""The types that qtool reads, by ggml's numbers."""
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Names of what ggml has besides, for messages."""
GGML_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: the length of rows last."""
    type: GgmlType
    start: int
    """In bytes, from the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        """Return the size of its data."""
        return prod(self.shape) // self.type.block_size * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file whose header has been read."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Return what llama.cpp calls the kind of model."""
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - numbers, text, lists
        """Return what the metadata say under the architecture's key, such as `block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Return rows of a tensor as they are stored: (rows, bytes of a row) uint8.

        Raises:
            CheckpointError: the file has become unreadable or shorter.
        """
        tensor = self.tensors[name]
        total = prod(tensor.shape[:-1])
        row_bytes = tensor.num_bytes // total if total else 0
        wanted = total - first if count is None else min(count, total - first)
        try:
            found = np.fromfile(
                self.path, np.uint8, wanted * row_bytes, offset=tensor.start + first * row_bytes
            )
        except OSError as error:
            raise CheckpointError(f"{self.path}: {reason(error)}.", file=self.path) from error
        if len(found) != wanted * row_bytes:
            raise CheckpointError(
                f"{self.path} ends within {shown(name)}. Download it again.", file=self.path
            )
        return torch.from_numpy(found).view(wanted, row_bytes)

    def plain(self, name: str) -> Tensor:
        """Return a tensor that isn't quantized: F32, F16 or BF16, as it is stored."""
        tensor = self.tensors[name]
        return self.rows(name).view(GGML_FLOATS[tensor.type.name]).reshape(tensor.shape)


def open_gguf(path: Path) -> GgufFile:
    """Read and check the header of a file.

    Raises:
        CheckpointError: it isn't a GGUF file that qtool reads, or it is damaged.
    """
    with _cursor(path) as cursor:
        num_tensors, metadata = _read_metadata(cursor)
        return GgufFile(path, metadata, _read_tensors(cursor, num_tensors, metadata))


def read_gguf_metadata(path: Path) -> Mapping[str, Any]:
    """Read what the header of a file says of its model, whatever its tensors are.

    Raises:
        CheckpointError: it isn't a GGUF file, or it is damaged.
    """
    with _cursor(path) as cursor:
        return _read_metadata(cursor)[1]


@contextlib.contextmanager
def _cursor(path: Path) -> Iterator["_Cursor"]:
    """Open a file; what is found to be wrong with it is told with its name."""
    try:
        mapped = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {reason(error)}.", file=path) from error
    try:
        yield _Cursor(memoryview(mapped))  # type: ignore[arg-type]
    except _DamagedError as error:
        raise CheckpointError(f"{path}: {error}", file=path) from None


class _DamagedError(Exception):
    """What is wrong with a file, as the end of a sentence about it."""


class _Cursor:
    """Reads a header from its beginning on."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        """Return the next bytes."""
        if count > len(self.data) - self.at:
            raise _DamagedError("the file ends within its header. Download it again.")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:  # noqa: ANN401
        """Return the next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, longest: int = 2**31) -> str:
        """Return the next text."""
        length = self.number("<Q")
        if length > longest:
            raise _DamagedError(f"its header has a name of {length} bytes. Download it again.")
        return str(self.take(length), "utf-8", "replace")

    def value(self, kind: int) -> Any:  # noqa: ANN401
        """Return the next value of a type; lists don't nest."""
        if kind == STRING:
            return self.text()
        if kind in GGUF_SCALARS:
            return self.number(GGUF_SCALARS[kind])
        if kind != ARRAY:
            raise _DamagedError(f"its metadata have a value of the unknown type {kind}.")
        of, count = self.number("<I"), self.number("<Q")
        if of == STRING:
            self._check_room(8 * count)
            return [self.text() for _ in range(count)]
        if of not in GGUF_SCALARS:
            raise _DamagedError(f"its metadata have a list of the unknown type {of}.")
        width = struct.calcsize(GGUF_SCALARS[of])
        self._check_room(width * count)
        return np.frombuffer(self.take(width * count), np.dtype(GGUF_SCALARS[of])).tolist()

    def _check_room(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.at:
            raise _DamagedError("the file ends within its header. Download it again.")


def _read_metadata(cursor: _Cursor) -> tuple[int, dict[str, Any]]:
    """Return the number of tensors, and the metadata."""
    if len(cursor.data) < len(GGUF_MAGIC) or bytes(cursor.take(4)) != GGUF_MAGIC:
        raise _DamagedError("it doesn't begin with GGUF, so it is no GGUF file.")
    version = cursor.number("<I")
    if version not in GGUF_VERSIONS:
        swapped = version & 0xFFFF == 0
        what = "is big-endian" if swapped else f"has version {version} of the format"
        raise _DamagedError(f"it {what}; qtool reads versions 2 and 3, little-endian.")
    num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.text(LONGEST_GGUF_NAME)
        metadata[key] = cursor.value(cursor.number("<I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise _DamagedError("its metadata have no general.architecture.")
    return num_tensors, metadata


def _read_tensors(
    cursor: _Cursor, num_tensors: int, metadata: Mapping[str, Any]
) -> dict[str, GgufTensor]:
    found = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamagedError(f"its alignment is {alignment!r}; a positive number is meant.")
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise _DamagedError(f"it has two tensors {shown(name)}.")
        tensors[name] = _checked(name, shape, kind, begin + offset, len(cursor.data))
    return tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(LONGEST_GGUF_NAME), cursor.number("<I")
    if not 1 <= dimensions <= GGML_DIMENSIONS:
        raise _DamagedError(f"{shown(name)} has {dimensions} dimensions; 1 to 4 are meant.")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def _checked(name: str, shape: tuple[int, ...], kind: int, start: int, size: int) -> GgufTensor:
    """Return a tensor that is of a known type, in whole blocks, and within the file."""
    if kind not in GGML_TYPES:
        known = ", ".join(each.name for each in GGML_TYPES.values())
        raise _DamagedError(
            f"{shown(name)} is of type {OTHER_TYPES.get(kind, f'number {kind}')}, which qtool "
            f"doesn't read; it reads {known}. Take a file of another quantization."
        )
    tensor = GgufTensor(name, shape, GGML_TYPES[kind], start)
    if not prod(shape) or shape[-1] % tensor.type.block_size:
        raise _DamagedError(
            f"{shown(name)} has shape {shape}; rows of {tensor.type.name} are of whole blocks of "
            f"{tensor.type.block_size}."
        )
    if start + tensor.num_bytes > size:
        raise _DamagedError(
            f"{shown(name)} would end at byte {start + tensor.num_bytes}, and the file has {size}. "
            "Download it again."
        )
    return tensor
