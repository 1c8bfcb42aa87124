"""A whole decoding step as one call into the library: weights and buffers as it wants them."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.core.native.library import NATIVE_DTYPES
from qtool.runtime.decode.ops import DecodeState
from qtool.runtime.decode.weights import DecoderLayer, DecoderWeights, Projection, Projections

SPANS = ("embed", "qkv", "attend", "output", "gate_up", "gate", "down", "head", "choose")
"""Parts of a step, in the order in which the library has their times."""
MOST_PARTS = 3
ROOM_ALIGNMENT = 64


class ProjectionText(Structure):
    """`qt_projection`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("rows", "inputs")),
        *((name, c_void_p) for name in ("packed", "dense")),
        ("dtype", c_int64),
    ]


class ProjectionsText(Structure):
    """`qt_projections`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("count", c_int64),
        ("parts", ProjectionText * MOST_PARTS),
    ]


NORMS = ("input_norm", "qkv_bias", "query_norm", "key_norm", "mlp_norm")
LINEARS = ("qkv", "output", "gate_up", "down")


class LayerText(Structure):
    """`qt_layer`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_void_p) for name in NORMS),
        *((name, ProjectionsText) for name in LINEARS),
    ]


class DecoderText(Structure):
    """`qt_decoder`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("num_layers", "hidden", "num_heads", "num_kv_heads")),
        *((name, c_int64) for name in ("head_dim", "intermediate", "vocab")),
        *((name, c_double) for name in ("norm_eps", "attention_scale")),
        *((name, c_void_p) for name in ("layers", "final_norm")),
        *((name, ProjectionsText) for name in ("embedding", "head")),
    ]


class StateText(Structure):
    """`qt_state`."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, c_int64) for name in ("batch", "max_length", "cache_dtype")),
        *((name, c_int64) for name in ("layer_stride", "sequence_stride", "history_stride")),
        *((name, c_void_p) for name in ("keys", "values", "rotary", "tokens", "positions")),
        *((name, c_void_p) for name in ("history", "steps", "logits", "room", "seconds")),
    ]


class DecoderTable:
    """A model's weights as the library reads them; made once for all steps of a model."""

    def __init__(self, weights: DecoderWeights, packed: Callable[[Any], int]) -> None:
        """Take weights.

        Args:
            weights: Of the model, on the CPU.
            packed: Returns the address of what the library has of a prepared weight.
        """
        self._kept: list[Any] = [weights]
        self._packed = packed
        shape, layers = weights.shape, (LayerText * len(weights.layers))()
        for text, layer in zip(layers, weights.layers, strict=True):
            self._fill(text, layer)
        self._kept.append(layers)
        self.text = DecoderText(
            num_layers=len(weights.layers),
            hidden=len(weights.final_norm),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            intermediate=max(layer.down.parts[0].inputs for layer in layers),
            vocab=shape.vocab_size,
            norm_eps=shape.norm_eps,
            attention_scale=shape.attention_scale,
            layers=ctypes.addressof(layers),
            final_norm=self._floats(weights.final_norm),
            embedding=self._projections(weights.embedding),
            head=self._projections(weights.head),
        )

    def _fill(self, text: LayerText, layer: DecoderLayer) -> None:
        for name in NORMS:
            setattr(text, name, self._floats(getattr(layer, name)))
        for name in LINEARS:
            setattr(text, name, self._projections(getattr(layer, name)))

    def _floats(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor's numbers as float32."""
        if tensor is None:
            return None
        self._kept.append(tensor.float().contiguous())
        return int(self._kept[-1].data_ptr())

    def _projections(self, projections: Projections) -> ProjectionsText:
        parts = projections if isinstance(projections, tuple) else (projections,)
        texts = (ProjectionText * MOST_PARTS)(*map(self._projection, parts))
        return ProjectionsText(len(parts), texts)

    def _projection(self, projection: Projection) -> ProjectionText:
        if not isinstance(projection, Tensor):
            rows, inputs = projection.shape  # type: ignore[attr-defined]
            return ProjectionText(rows, inputs, self._packed(projection), None, 0)
        weight = projection.contiguous()
        self._kept.append(weight)
        number = NATIVE_DTYPES.index(weight.dtype)
        return ProjectionText(*weight.shape, None, weight.data_ptr(), number)


class NativeStep:
    """Takes steps of a batch of sequences; every call reads and writes the buffers of a state."""

    def __init__(
        self,
        table: DecoderTable,
        state: DecodeState,
        library: Any,  # noqa: ANN401
        threads: Callable[[], int],
    ) -> None:
        self._table, self._state, self._library, self._threads = table, state, library, threads
        self._sized = 0
        self._logits = torch.empty(len(state.tokens), table.text.vocab)
        keys = state.keys
        self._text = StateText(
            batch=keys.shape[1],
            max_length=keys.shape[3],
            cache_dtype=NATIVE_DTYPES.index(keys.dtype),
            layer_stride=keys.stride(0),
            sequence_stride=keys.stride(1),
            history_stride=state.history.stride(0),
            keys=keys.data_ptr(),
            values=state.values.data_ptr(),
            rotary=state.rotary.data_ptr(),
            tokens=state.tokens.data_ptr(),
            positions=state.positions.data_ptr(),
            history=state.history.data_ptr(),
            steps=state.steps.data_ptr(),
            logits=self._logits.data_ptr(),
        )

    def __call__(self) -> Tensor:
        """Take one step; return its logits (batch, vocab_size) float32, overwritten by the next."""
        threads = self._threads()
        if threads > self._sized:
            self._make_room(threads)
        decoder, state = ctypes.byref(self._table.text), ctypes.byref(self._text)
        self._library.qt_decode_step(decoder, state, threads)
        return self._logits

    @contextmanager
    def timed(self) -> Iterator[dict[str, float]]:
        """Sum up the seconds of each of SPANS; the dictionary is filled when the block ends."""
        seconds, found = torch.zeros(len(SPANS), dtype=torch.float64), dict[str, float]()
        self._text.seconds = seconds.data_ptr()
        try:
            yield found
        finally:
            self._text.seconds = None
            found.update(zip(SPANS, seconds.tolist(), strict=True))

    def _make_room(self, threads: int) -> None:
        decoder = ctypes.byref(self._table.text)
        size = self._library.qt_decode_room(decoder, self._text.batch, threads)
        self._room = torch.zeros(size + ROOM_ALIGNMENT, dtype=torch.uint8)
        address = self._room.data_ptr()
        self._text.room = address + -address % ROOM_ALIGNMENT
        self._sized = threads
