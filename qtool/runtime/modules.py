"""QuantizedLinear, QuantizedEmbedding, TiedHead: stored parts and the backend that runs them."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import BackendWeight, KernelBackend, QuantizedTensor
from qtool.checkpoint.adapter import RANK_DOWN, RANK_UP, LayerAdapter, has_scales, rescaled
from qtool.checkpoint.manifest import LayerEntry
from qtool.core.activations import multiply_quantized
from qtool.formats._dtypes import dtype_of
from qtool.runtime.asked_weight import AskedWeight
from qtool.runtime.backends._choose import choose_backend, definition, wanted_backend
from qtool.runtime.differentiable import as_autocast, multiply_differentiably
from qtool.runtime.held import Held, finish_packing, takes_over
from qtool.runtime.host_memory import let_go_of_pages


class QuantizedWeight(nn.Module):
    """The parts of one weight as buffers, named as in the checkpoint.

    The backend is chosen and its layout prepared at the first call, when the device and the dtype
    of the activations are known; again when the module has moved, other parts were loaded, or
    activations of another dtype come. If the backend needs no more than its own layout, the buffers
    then wait in the host's memory, or in the file they are mapped from, for saving and for moves: a
    weight is there once. Copies and pickles have the parts where it is executed, and no layout.

    Buffers that are written to in place after the first call aren't read again; use
    `load_state_dict`.
    """

    def __init__(self, entry: LayerEntry) -> None:
        super().__init__()
        self.entry = entry
        self.wanted = wanted_backend()
        self._held: Held | None = None
        self._number: int | None = None
        self.adapter: LayerAdapter = {}
        """What is set, see `adapt`."""
        self.is_copied = False
        """A decoder has this weight once more, in memory of its own."""
        self.contents = object()
        """Another object whenever the parts were loaded or moved."""
        self._join()
        for name, spec in entry.layout().items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=dtype_of(spec.dtype)))

    @property
    def device(self) -> torch.device:
        """Return where the weight is executed, wherever its parts wait."""
        held = self._held
        if held is not None and held.home is not None:
            return held.home
        return self.get_buffer(next(iter(self.entry.layout()))).device

    @property
    def backend(self) -> KernelBackend | None:
        """Return what runs the weight, once it has run."""
        return None if self._held is None else self._held.backend

    def tensor(self) -> QuantizedTensor:
        """Return the weight as data, on its device, with the scales of an adapter that is set."""
        return rescaled(self.stored(), self.adapter)

    def stored(self, device: torch.device | None = None) -> QuantizedTensor:
        """Return the weight as the checkpoint has it, on a device; None: on its own."""
        entry, parts = self.entry, self._parts(device or self.device)
        return QuantizedTensor(entry.format, entry.scheme, entry.shape, parts)

    def adapt(self, adapter: LayerAdapter) -> None:
        """Run as an adapter has it from now on; an empty one gives the weight as it was stored.

        What is prepared takes over new scales in place if it can, so planes and decoders stay.
        """
        before, held = self.adapter, self._held
        self.adapter = {name: part.to(self.device) for name, part in adapter.items()}
        rescales = has_scales(before) or has_scales(adapter)
        if held is not None and rescales and not takes_over(held, self._rescaled):
            self._reset()
        elif self.is_copied or RANK_UP in before or RANK_UP in adapter:
            self.contents = object()

    def _rescaled(self) -> QuantizedTensor:
        return rescaled(self.stored(torch.device("cpu")), self.adapter)

    def choose_backend(self) -> KernelBackend:
        """Return the backend that runs the weight, or would."""
        return self.backend or choose_backend(self.tensor(), self.device, self.wanted)

    def prepare(self, dtype: torch.dtype) -> tuple[KernelBackend, Any]:
        """Return the backend and its prepared weight for activations of `dtype`."""
        if torch.compiler.is_dynamo_compiling():
            if self._number is not None:
                _made_ready(self._number, dtype)
        elif torch.compiler.is_exporting():  # what is exported has the parts as they are stored
            plainest = definition()
            return plainest, plainest.prepare(self.tensor(), dtype)
        held = self._ready(dtype)
        return held.backend, held.prepared

    def _ready(self, dtype: torch.dtype) -> Held:
        """Return what runs the weight, made now if need be."""
        held = self._held
        if held is None or held.dtype != dtype:
            backend = self.choose_backend()
            held = self._hold(backend, backend.prepare(self.tensor(), dtype), dtype)
        return held

    def adopt(self, part: BackendWeight, dtype: torch.dtype) -> None:
        """Give up the own layout for a part of a fused one, that its backend made for `dtype`.

        So a weight that a decoder has fused with others isn't on the card once more.
        """
        self._hold(self.choose_backend(), part, dtype)

    def _hold(self, backend: KernelBackend, prepared: BackendWeight, dtype: torch.dtype) -> Held:
        home = self.device if backend.owns_layout else None
        if home is not None:
            finish_packing(home)
        quantized = self.entry.activation is not None
        integers = backend.integer_product(self.tensor(), dtype) if quantized else None
        held = self._held = Held(backend, prepared, dtype, home, integers)
        self._number = None
        if home is not None:  # after the line above: `device` stays what it is
            self._buffers.update(waiting := self._parts(torch.device("cpu")))
            let_go_of_pages(waiting.values())
        return held

    def _parts(self, device: torch.device) -> dict[str, Tensor]:
        return {name: self.get_buffer(name).to(device) for name in self.entry.layout()}

    def _reset(self) -> None:
        """Bring the parts to where the weight is executed, and forget its layout."""
        self._buffers.update(self._parts(self.device))
        self.contents, self.is_copied = object(), False
        self._join()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect other parts."""
        self._reset()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled."""
        buffers = {**self._buffers, **self._parts(self.device)}
        return {**self.__dict__, "_held": None, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._join()

    def _join(self) -> None:
        """Forget the layout, and take a number by which a compiler finds this weight.

        One that has a layout has no number, so that a compiled block serves all blocks like it.
        """
        self._held, self._number = None, next(_NUMBERS)
        _WEIGHTS[self._number] = self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":  # noqa: FBT001, FBT002
        """Follow a move to another device, but keep the dtypes that the format prescribes."""
        device, kept = self.device, {name: self.get_buffer(name) for name in self.entry.layout()}
        home = fn(torch.empty(0, device=device)).device
        if self._held is not None and home == device:  # the layout stays, and so do the parts
            for name in kept:
                del self._buffers[name]
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._buffers.update(kept)
            return self
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != old.dtype or moved.device != home:
                setattr(self, name, old.to(home))
        if home != device:
            self.contents = object()
            self._join()
        return self


_NUMBERS = itertools.count()
_WEIGHTS: "weakref.WeakValueDictionary[int, QuantizedWeight]" = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _made_ready(number: int, dtype: torch.dtype) -> bool:
    """Prepare a weight while a graph of its first call is traced, outside of that graph."""
    weight = _WEIGHTS[number]
    weight._ready(dtype)
    weight._number = number  # the graph holds as long as what it has looked at is the same
    return True


class QuantizedLinear(QuantizedWeight):
    """Stands in for nn.Linear, and for GPT-2's Conv1D."""

    def __init__(self, entry: LayerEntry, bias: Tensor | None) -> None:
        super().__init__(entry)
        self.out_features, self.in_features = entry.shape
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias: (..., in_features) -> (..., out_features).

        Like nn.Linear under autocast in autocast's dtype. Otherwise in that of `x`, which nn.Linear
        wouldn't take: the weight is then prepared anew whenever the dtype changes.
        """
        x = as_autocast(x)
        backend, prepared = self.prepare(x.dtype)
        y = multiply_differentiably(
            x,
            lambda inputs: self._multiply(inputs, backend, prepared),
            (backend, prepared),
            self.entry.shape,
        )
        if RANK_UP in self.adapter:
            y = y + self._low_rank(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _low_rank(self, x: Tensor) -> Tensor:
        """Return what the low-rank part of an adapter adds."""
        down, up = (self.adapter[part].to(x.device, x.dtype) for part in (RANK_DOWN, RANK_UP))
        return x @ down.T @ up.T

    def _multiply(self, x: Tensor, backend: KernelBackend, prepared: BackendWeight) -> Tensor:
        """Return x @ W.T, of `x` quantized if the layer's entry says so."""
        scheme, held = self.entry.activation, self._held
        if scheme is None:
            return backend.matmul(x, prepared)
        integers = None if held is None else held.integers
        if integers is None or x.shape[:-1].numel() < integers.fewest_tokens:
            return multiply_quantized(x, scheme, lambda codes: backend.matmul(codes, prepared))
        y = integers.linear(x.flatten(0, -2), scheme)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def qweight(self) -> Tensor:
        """Return nothing, where the weight is executed: PEFT puts adapters beside a `qweight`."""
        return torch.empty(0, dtype=torch.int32, device=self.device)

    def product_of(self, tokens: int) -> str:
        """Return what multiplies so many tokens, once it has run: integers, or floats."""
        integers = None if self._held is None else self._held.integers
        return "integers" if integers and tokens >= integers.fewest_tokens else "floats"

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        entry = self.entry
        inputs = f", inputs {entry.activation}" if entry.activation is not None else ""
        return f"{self.in_features} -> {self.out_features}, {entry.format}, {entry.scheme}{inputs}"


class QuantizedEmbedding(AskedWeight, QuantizedWeight):
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


class TiedHead(AskedWeight):
    """The output head of a model whose quantized embedding is its head as well."""

    def __init__(self, embedding: QuantizedEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple: not a submodule, so its buffers aren't ours too
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias: (..., embedding_dim) -> (..., num_embeddings).

        In the table's dtype, so that both share a layout; the result's is autocast's, or as `x`.
        """
        x, table = as_autocast(x), self._embedding[0]
        backend, prepared = table.prepare(table.dtype)
        y = multiply_differentiably(
            x.to(table.dtype),
            lambda inputs: backend.matmul(inputs, prepared),
            (backend, prepared),
            table.entry.shape,
        ).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
