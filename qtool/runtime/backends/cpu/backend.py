"""Backend `cpu`: the library of kernels/cpu, compiled at install or at the first call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtool.base import Fused, IntegerProduct, KernelBackend, QuantizedTensor
from qtool.core.native.library import Library, found_library
from qtool.core.native.threads import library_threads
from qtool.formats import (
    affine,
    binary_coding,
    coded_scales,
    dint,
    minima,
    mixed_rows,
    nested,
)
from qtool.runtime.backends.cpu import operators
from qtool.runtime.backends.cpu.decode_ops import NativeCalls, NativeOps
from qtool.runtime.backends.cpu.packing import PackedWeight
from qtool.runtime.backends.cuda.centers import why_no_planes
from qtool.runtime.backends.dense import BACKEND as DENSE
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.parallel import spread_ops
from qtool.runtime.decode.weights import DecoderWeights

PACKABLE_FORMATS = (
    affine.AFFINE,
    binary_coding.BINARY_CODING,
    coded_scales.CODED_SCALES,
    dint.DINT,
    minima.MINIMA,
    mixed_rows.MIXED_ROWS,
    nested.NESTED,
)
SMALLEST_GROUP = 16
"""Inputs, or rows, of the smallest group: each takes the room of 32."""
LARGEST_GROUP = 1024
"""Inputs of the largest group that can't be cut into equal parts."""
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CpuWeight = PackedWeight | Tensor


class CpuBackend:
    """Executes packed weights; activations of 64 bits go through a dequantized one."""

    name = "cpu"
    priority = 15
    owns_layout = True
    decodes_on = "cpu"

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None for a weight of planes on the CPU, where there is a library."""
        if tensor.format not in PACKABLE_FORMATS:
            return f"it runs {', '.join(PACKABLE_FORMATS)} weights; this one is {tensor.format}."
        if device.type != "cpu":
            return f"it runs on the CPU; this weight is on {device}."
        reason = why_no_planes(tensor) or _why_not_groups(tensor)
        if reason is not None:
            return reason
        library = found_library()
        return library if isinstance(library, str) else None

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> CpuWeight:
        """Return the weight, laid out anew."""
        if dtype not in PACKED_DTYPES:
            return DENSE.prepare(tensor, dtype)
        return PackedWeight(tensor, dtype, _library())

    def matmul(self, x: Tensor, prepared: CpuWeight) -> Tensor:
        """Return x @ W.T; through the dequantized weight where a gradient is wanted."""
        if isinstance(prepared, Tensor):
            return DENSE.matmul(x, prepared)
        if x.requires_grad and torch.is_grad_enabled():
            return functional.linear(x, operators.packed_dense(prepared))
        return operators.packed_matmul(x, prepared)

    def rows(self, index: Tensor, prepared: CpuWeight) -> Tensor:
        """Return the rows that `index` names."""
        if isinstance(prepared, Tensor):
            return DENSE.rows(index, prepared)
        return operators.packed_rows(index, prepared)

    def integer_product(self, tensor: QuantizedTensor, dtype: torch.dtype) -> IntegerProduct | None:
        """Return None: tables are of floats."""
        del tensor, dtype
        return None

    def fuse(
        self, tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
    ) -> Fused | None:
        """Leave weights apart: a native step makes their tables once anyway."""
        if dtype not in PACKED_DTYPES:
            return DENSE.fuse(tensors, dtype, interleave=interleave)
        return None

    def decode_ops(self, weights: DecoderWeights) -> DecodeOps | None:
        """Return the native step and what reads prompts."""
        if weights.shape.dtype not in PACKED_DTYPES:
            return DENSE.decode_ops(weights)
        library = _library()
        calls = NativeCalls(
            library=library.calls,
            packed=lambda prepared: prepared.address,
            multiply=self.matmul,
            rows=self.rows,
            threads=library_threads,
        )
        return spread_ops(NativeOps(weights, calls), weights)


def _library() -> Library:
    library = found_library()
    assert not isinstance(library, str), library  # `why_not` has said so
    return library


def _why_not_groups(tensor: QuantizedTensor) -> str | None:
    scheme, length = tensor.scheme, tensor.scheme.grouped_length(tensor.shape)
    size = min(scheme.group_size or length, length)
    uncut = size < length and size % 32 != 0 and size > LARGEST_GROUP
    if size >= min(SMALLEST_GROUP, length) and (scheme.group_dim == "out_features" or not uncut):
        return None
    return (
        f"it runs groups of {SMALLEST_GROUP} and more, of in_features above {LARGEST_GROUP} in "
        f"multiples of 32; these are of {scheme.group_size or 'all'} {scheme.group_dim}."
    )


BACKEND: KernelBackend = CpuBackend()
