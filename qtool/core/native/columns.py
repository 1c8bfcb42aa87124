"""The column loops of error feedback and coordinate descent on a processor, each as one call.

In plain torch a column is about nine small operations, so that on a processor they took more than a
third of a solver's time. `kernels/cpu/columns.c` does the same for sixty-four rows at a time.
"""

import ctypes
import functools
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.core.grids import Pick, Tables, pick_affine, pick_binary
from qtool.core.native.library import Library, found_library
from qtool.core.native.threads import library_threads

ROWS_OF_A_TILE = 64
"""Rows that a thread takes through all columns."""
MOST_PLACES = 64


class ColumnsText(Structure):
    """`qt_columns`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("columns", "rows", "places")),
        *((name, c_void_p) for name in ("work", "before", "shares", "own", "first", "second")),
        ("codes_of", c_void_p),
        ("top", c_double),
        *((name, c_void_p) for name in ("codes", "levels", "room")),
    ]


@functools.cache
def has_native_loop() -> bool:
    """Return whether the library can be had; it is compiled now if need be."""
    return isinstance(found_library(), Library)


def runs_natively(pick: Pick, work: Tensor, tables: Tables) -> bool:
    """Return whether `walk_natively` can do a block (columns, rows), with its tables for `pick`."""
    known = pick is pick_affine or (pick is pick_binary and len(tables[0]) <= MOST_PLACES)
    return known and work.numel() > 0 and work.dtype == torch.float32


def walk_natively(
    pick: Pick, work: Tensor, matrix: Tensor, tables: Tables, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `column_loop.walk_columns` does, of whose arguments `runs_natively` says yes."""
    library, threads = found_library(), library_threads()
    assert isinstance(library, Library)
    columns, rows = work.shape
    places = len(tables[0]) if pick is pick_binary else 0
    first, other, third = (table.contiguous() for table in tables)
    second, codes_of = (third, other) if places else (other, other)
    kept = [work.contiguous(), matrix.T.contiguous(), matrix.diagonal().contiguous()]
    before = None if levels is None else levels.contiguous()
    codes = torch.empty((columns, rows), dtype=torch.uint8)
    chosen, room = torch.empty(columns, rows), torch.empty(threads, columns, ROWS_OF_A_TILE)
    text = ColumnsText(
        columns=columns,
        rows=rows,
        places=places,
        work=kept[0].data_ptr(),
        before=None if before is None else before.data_ptr(),
        shares=kept[1].data_ptr(),
        own=kept[2].data_ptr(),
        first=first.data_ptr(),
        second=second.data_ptr(),
        codes_of=codes_of.data_ptr(),
        top=0.0 if places else float(third),
        codes=codes.data_ptr(),
        levels=chosen.data_ptr(),
        room=room.data_ptr(),
    )
    library.calls.qt_columns_walk(ctypes.byref(text), threads)
    return codes, chosen
