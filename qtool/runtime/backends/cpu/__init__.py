"""Planes by tables of partial sums, on the processor."""

from qtool.runtime.backends.cpu.backend import BACKEND

__all__ = ["BACKEND"]
