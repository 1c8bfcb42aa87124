"""Weights as the library reads them, one stream each: kernels/cpu/planes.h says what is in it."""

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool import settings
from qtool.base import QuantizedTensor
from qtool.core.native.library import NATIVE_DTYPES, Library
from qtool.core.native.threads import library_threads
from qtool.formats.mixed_rows import MIXED_ROWS, split_rows
from qtool.plugins import check_name
from qtool.runtime.backends.cpu.streams import STREAM_ALIGNMENT, STREAMS
from qtool.runtime.backends.cuda.centers import CENTERS, planes_of
from qtool.scheme import Shape2D

MOST_GROUPED = 512
"""Inputs that share a scale of tables: more would be rounded to coarser steps."""
TILES_OF_TABLES = 4
"""Of 32 rows, that one lookup of each takes as long as making the tables."""
SPLITS = (512, 256, 128, 64, 32)
TABLE_KINDS = ("int16", "int8", "float32")
"""Of tables, by their number in the library; the first one is the default."""


class PlanesText(Structure):
    """`qt_planes`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("rows", "inputs", "group_size", "num_bits")),
        *((name, c_int64) for name in ("num_groups", "chunks", "tables", "centered")),
        *((name, c_int64) for name in ("tile_bytes", "blocks", "together", "panel_rows")),
        *((name, c_void_p) for name in ("stream", "next", "places", "numbers")),
    ]


PACKED_WEIGHTS: "weakref.WeakValueDictionary[int, PackedWeight]" = weakref.WeakValueDictionary()
"""All weights there are, by the address of what the library has of them."""


class PackedWeight:
    """A weight of planes, ready for the library; nothing else of it need be in memory."""

    def __init__(self, tensor: QuantizedTensor, dtype: torch.dtype, library: Library) -> None:
        """Lay a weight out.

        Args:
            tensor: Of a format that `planes_of` makes planes of, or whose classes of rows are.
            dtype: Of the activations.
            library: Runs it.

        Raises:
            UnknownNameError: $QTOOL_CPU_TABLES is no kind of tables.
        """
        self.shape, self.dtype, self._library = Shape2D(*tensor.shape), dtype, library
        self.tables = settings.cpu_tables() or TABLE_KINDS[0]
        check_name(self.tables, TABLE_KINDS, "kinds of tables")
        self._kept: list[Any] = []
        classes: Sequence[QuantizedTensor] = (tensor,)
        numbers = None
        if tensor.format == MIXED_ROWS:
            classes, numbers = split_rows(tensor)
        self._texts = [self._text(planes_of(part)) for part in classes]
        for text, after in pairwise(self._texts):
            text.next = ctypes.addressof(after)
        if numbers is not None:
            self._name_rows(numbers.contiguous())
        self.address = ctypes.addressof(self._texts[0])
        self.handle = torch.tensor([self.address])
        """A tensor, so that graphs of a compiler hold for all weights of a shape."""
        PACKED_WEIGHTS[self.address] = self

    @property
    def num_bytes(self) -> int:
        """Return what the streams take."""
        return sum(each.nbytes for each in self._kept)

    @property
    def level(self) -> str:
        """Return of which level of instructions what runs it is."""
        return self._library.level

    @property
    def planes_per_row(self) -> float:
        """Return how many planes a row has, on average."""
        return sum(text.rows * text.num_bits for text in self._texts) / self.shape.out_features

    @property
    def table_work(self) -> float:
        """Return planes per row, and as many more as making tables takes that few rows share."""
        first = self._texts[0]
        own = TILES_OF_TABLES / first.together if first.panel_rows else 0.0
        return self.planes_per_row * (1.0 + own)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x @ W.T by tables: (tokens, in_features) -> (tokens, out_features) float32."""
        x = x.float().contiguous()
        y = torch.empty(len(x), self.shape.out_features)
        calls = self._library.calls
        room = torch.empty(
            calls.qt_planes_room(self.address, len(x)) + STREAM_ALIGNMENT, dtype=torch.int8
        )
        place = room.data_ptr() + -room.data_ptr() % STREAM_ALIGNMENT
        pointers = (x.data_ptr(), len(x), place, y.data_ptr())
        calls.qt_planes_multiply(self.address, *pointers, library_threads())
        return y

    def rows(self, index: Tensor) -> Tensor:
        """Return rows of W, index.shape + (in_features,), in the dtype of the activations.

        Raises:
            IndexError: there is no such row.
        """
        index = index.long().contiguous()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.shape[0]:
            raise IndexError(
                f"Rows {int(index.min())} .. {int(index.max())} are asked for; the weight has 0 .. "
                f"{self.shape[0] - 1}."
            )
        found = torch.empty(*index.shape, self.shape.in_features, dtype=self.dtype)
        return self._dequantized(found, index.data_ptr(), 0)

    def block(self, first: int, count: int) -> Tensor:
        """Return rows first .. first + count - 1 of W, in the dtype of the activations."""
        found = torch.empty(count, self.shape.in_features, dtype=self.dtype)
        return self._dequantized(found, None, first)

    def dense(self) -> Tensor:
        """Return W: (out_features, in_features)."""
        return self.block(0, self.shape.out_features)

    def _dequantized(self, found: Tensor, index: int | None, first: int) -> Tensor:
        """Fill in rows: those whose numbers are at an address, else from `first` on."""
        count, dtype = found.shape[:-1].numel(), NATIVE_DTYPES.index(found.dtype)
        pointers = (index, first, count, dtype, found.data_ptr())
        self._library.calls.qt_planes_rows(self.address, *pointers, library_threads())
        return found

    def _text(self, tensor: QuantizedTensor) -> PlanesText:
        """Lay out one class of rows."""
        centered = CENTERS in tensor.parts
        scales, offsets = tensor.parts["plane_scales"], tensor.parts.get("plane_offsets")
        offsets = tensor.parts[CENTERS] if centered else offsets
        inputs, along_rows = tensor.shape.in_features, tensor.scheme.group_dim == "out_features"
        length = tensor.scheme.grouped_length(tensor.shape)
        size = min(tensor.scheme.group_size or length, length)
        parts = min(MOST_GROUPED, inputs) if along_rows else split_size(size, inputs)
        groups = -(-inputs // parts)
        text = PlanesText(*tensor.shape, parts, tensor.scheme.num_bits, centered=centered)
        text.panel_rows = size if along_rows else 0
        text.tables = TABLE_KINDS.index(self.tables)
        calls, address = self._library.calls, ctypes.addressof(text)
        stream = STREAMS.empty(calls.qt_planes_size(address))
        text.stream = stream.ctypes.data
        spread = [
            None
            if part is None
            else part.half().contiguous()
            if along_rows
            else _repeated(part, -(-size // parts), groups)
            for part in (scales, offsets)
        ]
        planes = tensor.parts["bit_planes"].contiguous()
        pointers = [None if part is None else part.data_ptr() for part in (planes, *spread)]
        calls.qt_planes_pack(address, *pointers, library_threads())
        self._kept.append(stream)
        return text

    def _name_rows(self, numbers: Tensor) -> None:
        """Say where the rows of classes belong."""
        places = numbers.argsort()
        first = 0
        for text in self._texts:
            text.places = places.data_ptr() + first * places.element_size()
            first += text.rows
        self._texts[0].numbers = numbers.data_ptr()
        self._named = (places, numbers)


def split_size(size: int, inputs: int) -> int:
    """Return the inputs of a group as the library has it, of groups of `size`: all, or a part."""
    if size <= MOST_GROUPED:
        return size
    if size >= inputs:
        return MOST_GROUPED
    return next((part for part in SPLITS if size % part == 0), size)


def _repeated(parameters: Tensor, times: int, groups: int) -> Tensor:
    """Return parameters (..., groups) of groups that are cut into `times` each."""
    if times > 1:
        parameters = parameters.repeat_interleave(times, dim=-1)[..., :groups]
    return parameters.half().contiguous()
