"""Planes, tables and tiles on a CUDA card."""

from qtool.runtime.backends.cuda.backend import BACKEND

__all__ = ["BACKEND"]
