"""QuantizedLinear, QuantizedEmbedding, TiedHead: stored parts and the backend that runs them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import KernelBackend, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.runtime.select import choose_backend, wanted_backend

TORCH_DTYPES = {
    "int32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Lent:
    """A prepared weight that is part of another one."""

    view: Callable[[], Any]


class QuantizedWeight(nn.Module):
    """The parts of one weight as buffers, named as in the checkpoint.

    The backend is chosen and its layout prepared at the first call, when the device and the dtype
    of the activations are known; again after the module has moved. If the backend needs no more
    than its own layout, the buffers then wait in the host's memory, for saving and for moves: a
    card holds a weight once.
    """

    def __init__(self, entry: LayerEntry) -> None:
        super().__init__()
        self.entry = entry
        self.wanted = wanted_backend()
        self.backend: KernelBackend | None = None
        self._prepared: Any = None
        self._home: torch.device | None = None
        self._prepared_dtype: torch.dtype | None = None
        for name, spec in entry.layout().items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]))

    @property
    def device(self) -> torch.device:
        """Return where the weight is executed, wherever its parts wait."""
        return self._home or self.get_buffer(next(iter(self.entry.layout()))).device

    def tensor(self) -> QuantizedTensor:
        """Return the weight as data, on its device."""
        entry = self.entry
        parts = {name: self.get_buffer(name).to(self.device) for name in entry.layout()}
        return QuantizedTensor(entry.format, entry.scheme, entry.shape, parts)

    def choose_backend(self) -> KernelBackend:
        """Return the backend that runs the weight, or would."""
        entry = self.entry
        parts = {name: self.get_buffer(name) for name in entry.layout()}
        tensor = QuantizedTensor(entry.format, entry.scheme, entry.shape, parts)
        return self.backend or choose_backend(tensor, self.device, self.wanted)

    def prepare(self, dtype: torch.dtype) -> tuple[KernelBackend, Any]:
        """Return the backend and its prepared weight for activations of `dtype`."""
        if self.backend is None or self._prepared_dtype != dtype:
            backend = self.choose_backend()
            self._hold(backend, backend.prepare(self.tensor(), dtype), dtype)
        assert self.backend is not None
        prepared = self._prepared
        return self.backend, prepared.view() if isinstance(prepared, Lent) else prepared

    def lend(self, backend: KernelBackend, view: Callable[[], Any], dtype: torch.dtype) -> None:
        """Give up the own layout: for `dtype`, `view` makes it from that of a fused weight.

        So a weight that a decoder has fused with others isn't on the card once more.
        """
        self._hold(backend, Lent(view), dtype)

    def _hold(self, backend: KernelBackend, prepared: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        self.backend, self._prepared, self._prepared_dtype = backend, prepared, dtype
        if backend.owns_layout:
            self._home = self.device
            for name in self.entry.layout():
                setattr(self, name, self.get_buffer(name).cpu())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":  # noqa: FBT001, FBT002
        """Follow a move to another device, but keep the dtypes that the format prescribes."""
        kept = {name: self.get_buffer(name) for name in self.entry.layout()}
        home = fn(torch.empty(0, device=self.device)).device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != old.dtype or moved.device != home:
                setattr(self, name, old.to(home))
        self.backend = self._prepared = self._home = None
        return self


class QuantizedLinear(QuantizedWeight):
    """Stands in for nn.Linear, and for GPT-2's Conv1D."""

    def __init__(self, entry: LayerEntry, bias: Tensor | None) -> None:
        super().__init__(entry)
        self.out_features, self.in_features = entry.shape
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias: (..., in_features) -> (..., out_features)."""
        backend, prepared = self.prepare(x.dtype)
        y = backend.matmul(x, prepared)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        return (
            f"{self.in_features} -> {self.out_features}, {self.entry.format}, {self.entry.scheme}"
        )


class QuantizedEmbedding(QuantizedWeight):
    """Stands in for nn.Embedding, with the constant factor that some families put behind it."""

    def __init__(self, entry: LayerEntry, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__(entry)
        self.num_embeddings, self.embedding_dim = entry.shape
        self.dtype, self.factor = dtype, factor

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows of the tokens: (...) int64 -> (..., embedding_dim)."""
        backend, prepared = self.prepare(self.dtype)
        rows = backend.rows(index, prepared).to(self.dtype)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedEmbedding":  # noqa: FBT001, FBT002
        """Follow the model's dtype too: it is what the blocks expect as input."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


class TiedHead(nn.Module):
    """The output head of a model whose quantized embedding is its head as well."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple: not a submodule, so its buffers aren't ours too

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T: (..., embedding_dim) -> (..., num_embeddings)."""
        backend, prepared = self._embedding[0].prepare(x.dtype)
        return backend.matmul(x, prepared)
