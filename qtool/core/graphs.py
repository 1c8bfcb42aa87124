"""Replay a loop of small kernels as one CUDA graph.

The column loops of the solvers launch about ten tiny kernels per column, and launching them takes
far longer than running them. A graph is captured once per function and shapes, then replayed with
new data. On other devices the function is simply called.
"""

from collections import OrderedDict
from collections.abc import Callable
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
