"""Codes and levels of a group of columns on a processor, as one call.

In plain torch an iteration goes through memory some sixty times and multiplies twice as much: it
whitens levels where signs do. `kernels/cpu/groups.c` does the same for sixty-four rows at a time.
"""

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.core.linalg import RIDGE
from qtool.core.native.columns import has_native_loop
from qtool.core.native.library import Library, found_library
from qtool.core.native.threads import library_threads

MOST_SOLVED_PLANES = 6
MOST_COLUMNS = 1024
"""Of a group: a thread's room is about a kilobyte per column and plane."""


class GroupText(Structure):
    """`qt_group`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("columns", "rows", "bits", "offset")),
        *((name, c_int64) for name in ("starts", "iterations")),
        ("ridge", c_double),
        *((name, c_void_p) for name in ("weight", "shares", "whitening", "theta")),
        *((name, c_void_p) for name in ("codes", "parameters", "errors", "room")),
    ]


class EquationsText(Structure):
    """`qt_equations`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("columns", "rows", "bits", "offset")),
        *((name, c_void_p) for name in ("codes", "matrix", "gradient", "normal", "right", "room")),
    ]


def takes_group(columns: int, num_bits: int, like: Tensor) -> bool:
    """Return whether `group_natively` can do a group of so many columns and planes."""
    fits = 0 < columns <= MOST_COLUMNS and num_bits <= MOST_SOLVED_PLANES
    on_processor = like.device.type == "cpu" and like.dtype == torch.float32
    return fits and on_processor and like.numel() > 0 and has_native_loop()


def group_natively(
    weight: Tensor, upper: Tensor, starts: Tensor, *, offset: bool, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `binary_feedback.solve_group` does, of whose arguments `takes_group` says yes."""
    library, threads = found_library(), library_threads()
    assert isinstance(library, Library)
    columns, rows = weight.shape
    num_bits = starts.shape[1] - 1
    eye = torch.eye(columns, dtype=upper.dtype)
    whitening = torch.linalg.solve_triangular(upper.T, eye, upper=False).contiguous()
    shares = (upper / upper.diagonal().unsqueeze(1)).T.contiguous()
    weight, starts = weight.contiguous(), starts.contiguous()
    codes = torch.empty((columns, rows), dtype=torch.uint8)
    parameters, errors = torch.empty_like(starts[0]), torch.empty(columns, rows)
    room = torch.empty(threads, library.calls.qt_group_room(columns, num_bits))
    text = GroupText(
        columns=columns,
        rows=rows,
        bits=num_bits,
        offset=int(offset),
        starts=len(starts),
        iterations=iterations,
        ridge=RIDGE,
        weight=weight.data_ptr(),
        shares=shares.data_ptr(),
        whitening=whitening.data_ptr(),
        theta=starts.data_ptr(),
        codes=codes.data_ptr(),
        parameters=parameters.data_ptr(),
        errors=errors.data_ptr(),
        room=room.data_ptr(),
    )
    library.calls.qt_group_solve(ctypes.byref(text), threads)
    return codes, parameters, errors


def equations_natively(
    codes: Tensor, matrix: Tensor, gradient: Tensor, num_bits: int, *, offset: bool
) -> tuple[Tensor, Tensor]:
    """Return what the planes of a group's codes, and ones for the offset, are in normal equations.

    Args:
        codes: (columns, rows) uint8.
        matrix: (columns, columns) float32, symmetric: the group's part of the Hessian.
        gradient: (columns, rows) float32.
        num_bits: How many planes there are; `takes_group` says yes.
        offset: Whether there is one.

    Returns:
        Their products under the matrix (rows, unknowns, unknowns), and with the gradient
        (rows, unknowns): float64, of sums in float32.
    """
    library, threads = found_library(), library_threads()
    assert isinstance(library, Library)
    (columns, rows), unknowns = codes.shape, num_bits + int(offset)
    kept = codes.contiguous(), matrix.contiguous(), gradient.contiguous()
    normal = torch.empty(rows, unknowns, unknowns, dtype=torch.float64)
    right = torch.empty(rows, unknowns, dtype=torch.float64)
    room = torch.empty(threads, library.calls.qt_group_room(columns, num_bits))
    text = EquationsText(
        columns=columns,
        rows=rows,
        bits=num_bits,
        offset=int(offset),
        codes=kept[0].data_ptr(),
        matrix=kept[1].data_ptr(),
        gradient=kept[2].data_ptr(),
        normal=normal.data_ptr(),
        right=right.data_ptr(),
        room=room.data_ptr(),
    )
    library.calls.qt_group_equations(ctypes.byref(text), threads)
    return normal, right
