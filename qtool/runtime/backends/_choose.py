"""Which backend executes a weight: the best that can, unless one is asked for by name."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

import qtool.runtime.backends
from qtool import plugins, settings
from qtool.base import KernelBackend, QuantizedTensor
from qtool.errors import BackendError

_WANTED: ContextVar[str | None] = ContextVar("qtool_backend", default=None)


def load_backend(name: str) -> KernelBackend:
    """Return a backend by name; importing it must not need what it runs on."""
    return plugins.load(qtool.runtime.backends, name, "BACKEND", object)  # type: ignore[return-value]


def definition() -> KernelBackend:
    """Return the backend that runs parts as they are stored, everywhere."""
    return min(_all(), key=lambda backend: (backend.owns_layout, backend.priority))


def _all() -> list[KernelBackend]:
    return [load_backend(name) for name in plugins.names(qtool.runtime.backends)]


def wanted_backend() -> str | None:
    """Return the name asked for by `use_backend` or $QTOOL_BACKEND; None: choose."""
    return _WANTED.get() or settings.backend()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Make models loaded inside the block use one backend; None: choose.

    Raises:
        UnknownNameError: there is no such backend.
    """
    if name is not None:
        load_backend(name)
    token = _WANTED.set(name)
    try:
        yield
    finally:
        _WANTED.reset(token)


def reasons_against(tensor: QuantizedTensor, device: torch.device) -> dict[str, str]:
    """Return why backends can't execute `tensor` on `device`, by their names."""
    answers = {backend.name: backend.why_not(tensor, device) for backend in _all()}
    return {name: reason for name, reason in answers.items() if reason is not None}


def choose_backend(
    tensor: QuantizedTensor, device: torch.device, wanted: str | None
) -> KernelBackend:
    """Return the backend that will execute `tensor` on `device`.

    Raises:
        BackendError: the wanted one can't; the message has its reason.
    """
    if wanted is not None:
        backend = load_backend(wanted)
        reason = backend.why_not(tensor, device)
        if reason is not None:
            raise BackendError(f"Backend '{wanted}' can't run this weight: {reason}")
        return backend
    able = [backend for backend in _all() if backend.why_not(tensor, device) is None]
    return max(able, key=lambda backend: backend.priority)  # `definition` always can
