"""Ways around the cost of launching the small kernels of a column loop on a CUDA card.

The column loops of the solvers launch about ten tiny kernels per column, and launching them takes
far longer than running them. Best is one kernel for the whole loop: `column_kernels`, where there
is Triton. What that doesn't cover is replayed as a CUDA graph, captured once per function and
shapes, with new data. On other devices the function is simply called.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MAX_GRAPHS = 24
MAX_COLUMNS = 512
"""Longer loops aren't captured: a graph has about ten nodes per column."""

TensorFunction = Callable[..., tuple[Tensor, ...]]
_graphs: "OrderedDict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]]" = (
    OrderedDict()
)


@cache
def column_kernels(device: torch.device) -> ModuleType | None:
    """Return `qtool.core.column_kernels`, or None where it can't run.

    Args:
        device: Where the tensors are.
    """
    if device.type != "cuda":
        return None
    try:
        from qtool.core import column_kernels as kernels
    except ImportError:
        return None
    try:
        kernels.probe(device)
    except Exception as error:  # noqa: BLE001 - Triton needs a C compiler, and more may be amiss
        warnings.warn(f"Triton kernels can't be built; this takes longer: {error}", stacklevel=2)
        return None
    return kernels


def replay(function: TensorFunction, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return function(*inputs), through a graph where that is faster.

    Args:
        function: Pure: its result depends on the tensors alone, and no value leaves the card
            while it runs.
        inputs: The first one's first dimension is the length of the loop.
    """
    if not inputs[0].is_cuda or len(inputs[0]) > MAX_COLUMNS:
        return function(*inputs)
    key = (function, inputs[0].device, tuple((x.shape, x.dtype) for x in inputs))
    if key not in _graphs:
        _graphs[key] = _capture(function, inputs)
        if len(_graphs) > MAX_GRAPHS:
            _graphs.popitem(last=False)
    _graphs.move_to_end(key)
    graph, buffers, outputs = _graphs[key]
    for buffer, value in zip(buffers, inputs, strict=True):
        buffer.copy_(value)
    graph.replay()
    return tuple(output.clone() for output in outputs)


def _capture(
    function: TensorFunction, inputs: tuple[Tensor, ...]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]:
    with torch.cuda.device(inputs[0].device):  # another may be current: streams and graphs are its
        buffers = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*buffers)  # what is created at first use must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*buffers)
    return graph, buffers, outputs
