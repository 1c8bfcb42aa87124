"""Levels of groups of weights by alternation on a processor, as one call.

In plain torch a round is some fifty operations on small tensors. `kernels/cpu/fits.c` takes one
group after another through all starts and rounds, within the nearest cache.
"""

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qtool.core.native.columns import has_native_loop
from qtool.core.native.library import Library, found_library
from qtool.core.native.threads import library_threads

if TYPE_CHECKING:
    from qtool.core.alternating import FitOptions

MOST_FITTED_PLANES = 6
MOST_FITTED_WEIGHTS = 512
"""Of a group: each is compared with all others, which sorts few of them fastest."""


class FitText(Structure):
    """`qt_fit`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("groups", "size", "bits", "offset", "rounds", "greedy")),
        ("ratios", c_int64),
        *((name, c_double) for name in ("ridge", "progress")),
        *((name, c_void_p) for name in ("values", "importance", "ratio", "theta", "error", "room")),
    ]


def fits_natively(groups: Tensor, num_bits: int) -> bool:
    """Return whether `fit_groups` can do groups (groups, group_size) of so many planes."""
    small = 0 < groups.shape[-1] <= MOST_FITTED_WEIGHTS and num_bits <= MOST_FITTED_PLANES
    on_processor = groups.device.type == "cpu" and groups.dtype == torch.float32
    return small and on_processor and len(groups) > 0 and has_native_loop()


def fit_groups(
    groups: Tensor, importance: Tensor, options: "FitOptions", ridge: float, progress: float
) -> tuple[Tensor, Tensor]:
    """Do what `alternating.fit` does, of whose groups `fits_natively` says yes.

    Args:
        groups: (groups, group_size) float32.
        importance: Likewise.
        options: How hard to search.
        ridge: Relative, of least squares.
        progress: A round that lowers the error by a smaller fraction is the last one.

    Returns:
        Scales and offset (groups, num_bits + 1), and errors (groups,), float64.
    """
    library, threads = found_library(), library_threads()
    assert isinstance(library, Library)
    count, size = groups.shape
    groups, importance = groups.contiguous(), importance.float().contiguous()
    ratios = torch.tensor(options.clip_ratios, dtype=torch.float64)
    theta = torch.empty(count, options.num_bits + 1, dtype=torch.float64)
    error = torch.empty(count, dtype=torch.float64)
    room = torch.empty(threads, library.calls.qt_fit_room(size), dtype=torch.float64)
    text = FitText(
        groups=count,
        size=size,
        bits=options.num_bits,
        offset=int(options.offset),
        rounds=options.rounds,
        greedy=int(options.greedy),
        ratios=len(options.clip_ratios),
        ridge=ridge,
        progress=progress,
        values=groups.data_ptr(),
        importance=importance.data_ptr(),
        ratio=ratios.data_ptr(),
        theta=theta.data_ptr(),
        error=error.data_ptr(),
        room=room.data_ptr(),
    )
    library.calls.qt_fit_groups(ctypes.byref(text), threads)
    return theta, error
