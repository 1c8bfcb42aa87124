"""Modules whose parameters take no memory until they are filled from the source."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qtool.modeling.source import ModelSource


@contextmanager
def weightless() -> Iterator[None]:
    """Let modules built inside have parameters without memory, but real buffers."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = empty

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def fill(module: nn.Module, prefix: str, source: ModelSource, device: str) -> None:
    """Read a module's parameters and stored buffers from the source, in the dtypes it has them in.

    Buffers that no file holds stay what the class made.
    """
    for name, part in module.named_modules(prefix=prefix):
        fill_own(part, name, source, device)


def fill_own(module: nn.Module, prefix: str, source: ModelSource, device: str) -> None:
    """Fill what a module holds itself, not what its children hold."""
    names = {
        name: f"{prefix}.{name}".lstrip(".") for name in (*module._parameters, *module._buffers)
    }
    for name, old in module._parameters.items():
        if old is not None:
            value = source.read_exact(names[name]).to(device, old.dtype)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, made in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        if made is not None and persistent and source.has(names[name]):
            module._buffers[name] = source.read(names[name]).to(device, made.dtype)


def empty_own(module: nn.Module) -> None:
    """Take the memory of a module's own parameters; buffers stay."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
