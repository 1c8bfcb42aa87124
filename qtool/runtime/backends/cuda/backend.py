"""Backend `cuda`: the kernels of kernels/*.cu, on a card with CuPy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.base import Fused, IntegerProduct, KernelBackend, QuantizedTensor
from qtool.formats import (
    affine,
    binary_coding,
    coded_scales,
    dint,
    minima,
    mixed_rows,
    nested,
    ordered_affine,
)
from qtool.runtime.backends.cuda import (
    fusing,
    int_linear,
    integers,
    linear_kernels,
    mixed,
    operators,
)
from qtool.runtime.backends.cuda.centers import why_no_planes
from qtool.runtime.backends.cuda.compiling import compile_ahead
from qtool.runtime.backends.cuda.decode_ops import HEAD_DIMS, KernelOps
from qtool.runtime.backends.cuda.driver import card_of, launch, why_not_on
from qtool.runtime.backends.cuda.expert_products import can_capture
from qtool.runtime.backends.cuda.fusing import HalfWeight
from qtool.runtime.backends.cuda.int_tiles import IntTiles
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import KERNEL_DTYPES
from qtool.runtime.backends.cuda.mixed import MixedWeight
from qtool.runtime.backends.cuda.ordered import OrderedWeight, prepare_any
from qtool.runtime.backends.cuda.peer_products import peers_of
from qtool.runtime.backends.cuda.peer_sum import sum_over_peers
from qtool.runtime.backends.cuda.selection import STORED_KERNELS, wanted_kernel
from qtool.runtime.backends.dense import BACKEND as DENSE
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.parallel import spread_ops
from qtool.runtime.decode.weights import DecoderWeights
from qtool.scheme import ActivationScheme

FORMATS = (
    affine.AFFINE,
    binary_coding.BINARY_CODING,
    coded_scales.CODED_SCALES,
    dint.DINT,
    minima.MINIMA,
    mixed_rows.MIXED_ROWS,
    nested.NESTED,
    ordered_affine.ORDERED_AFFINE,
)
Prepared = KernelWeight | HalfWeight | MixedWeight | OrderedWeight | Tensor


class CudaBackend:
    """Executes packed weights; activations of 32 bit and more go through a dequantized one."""

    name = "cuda"
    priority = 20
    owns_layout = True
    decodes_on = "cuda"

    def why_not(self, tensor: QuantizedTensor, device: torch.device) -> str | None:
        """Return None for a weight of planes on a card with CuPy, else what is missing."""
        if tensor.format not in FORMATS:
            return f"it runs {', '.join(FORMATS)} weights; this one is {tensor.format}."
        return why_no_planes(tensor) or why_not_on(device)

    def prepare(self, tensor: QuantizedTensor, dtype: torch.dtype) -> Prepared:
        """Return the re-laid weight."""
        if dtype not in KERNEL_DTYPES:
            return DENSE.prepare(tensor, dtype)
        return prepare_any(tensor, dtype)

    def matmul(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Return x @ W.T."""
        if isinstance(prepared, Tensor):
            return DENSE.matmul(x, prepared)
        if isinstance(prepared, OrderedWeight):
            return self.matmul(prepared.sorted(x), prepared.weight)
        if isinstance(prepared, MixedWeight):
            run = operators.mixed_matmul_operator if prepared.is_tiled else _multiply_mixed
            return run(x, prepared)
        if isinstance(prepared, HalfWeight):
            prepared = prepared.weight()
        # An operator, which a compiler knows, doesn't read what is stored.
        if prepared.stored is None or (prepared.is_packed and torch.compiler.is_compiling()):
            return operators.matmul_operator(x, prepared)
        return _matmul(x, prepared)

    def rows(self, index: Tensor, prepared: Prepared) -> Tensor:
        """Return the rows that `index` names."""
        if isinstance(prepared, Tensor):
            return DENSE.rows(index, prepared)
        if isinstance(prepared, OrderedWeight):
            return prepared.in_place(self.rows(index, prepared.weight))
        if isinstance(prepared, MixedWeight):
            run = operators.mixed_rows_operator if prepared.is_tiled else _gather_mixed
            return run(index, prepared)
        if isinstance(prepared, HalfWeight):
            prepared = prepared.weight()
        if prepared.is_packed:
            return operators.rows_operator(index, prepared)
        return _rows(index, prepared)

    def integer_product(self, tensor: QuantizedTensor, dtype: torch.dtype) -> IntegerProduct | None:
        """Return integers for the tensor cores: by our kernel, else with one scale per row."""
        return integers.integer_product(tensor, dtype)

    def fuse(
        self, tensors: Sequence[QuantizedTensor], dtype: torch.dtype, *, interleave: bool = False
    ) -> Fused | None:
        """Put weights into one, unless a kernel is asked for that reads each as it is stored."""
        if dtype not in KERNEL_DTYPES:
            return DENSE.fuse(tensors, dtype)
        if wanted_kernel() in STORED_KERNELS:
            return None
        return fusing.fuse(tensors, dtype, interleave=interleave)

    def decode_ops(self, weights: DecoderWeights) -> DecodeOps | None:
        """Return the operations by the kernels; None where they don't take the shape of a model."""
        device, shape = weights.final_norm.device, weights.shape
        if shape.dtype not in KERNEL_DTYPES:
            return DENSE.decode_ops(weights)
        if shape.head_dim not in HEAD_DIMS or why_not_on(device) is not None:
            return None
        if not all(can_capture(layer.experts) for layer in weights.layers if layer.experts):
            return None
        index, group = device.index or 0, weights.group
        peers = peers_of(group, card_of(index)) if group else None
        ops = KernelOps(launch, card_of(index), lambda calls: compile_ahead(calls, index), peers)
        return spread_ops(ops, weights, sum_over_peers(group, launch) if group else None)


def _matmul(x: Tensor, weight: KernelWeight) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    y = linear_kernels.matmul(tokens, weight, launch, card_of(x.device.index or 0))
    return y.view(*x.shape[:-1], y.shape[-1])


def _rows(index: Tensor, weight: KernelWeight) -> Tensor:
    return linear_kernels.rows(index, weight, launch)


def _multiply_mixed(x: Tensor, weight: MixedWeight) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    y = mixed.multiply_mixed(tokens, weight, launch, card_of(x.device.index or 0))
    return y.view(*x.shape[:-1], y.shape[-1])


def _gather_mixed(index: Tensor, weight: MixedWeight) -> Tensor:
    return mixed.gather_mixed(index, weight, launch)


def _int_linear(x: Tensor, weight: IntTiles, scheme: ActivationScheme) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    y = int_linear.int_linear(tokens, weight, scheme, launch, card_of(x.device.index or 0))
    return y.view(*x.shape[:-1], y.shape[-1])


operators.implement(_matmul, _rows)
operators.implement_integers(_int_linear)
operators.implement_mixed(_multiply_mixed, _gather_mixed)
BACKEND: KernelBackend = CudaBackend()
