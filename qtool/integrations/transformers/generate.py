"""`model.generate` of a loaded checkpoint, through the decode runner where it can.

A model's class is replaced by a subclass of the same name that overrides `_sample`: the loop that
transformers runs for greedy search and for sampling, and whose arguments are the same from 4.57 to
5.x. Whatever the runner doesn't do goes to transformers' own loop.
"""

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qtool import settings
from qtool.base import CausalModel, KernelBackend
from qtool.integrations.transformers.sampling import SharedRunner, sample
from qtool.runtime.backends.dense import BACKEND as DENSE
from qtool.runtime.decode import read_model as llama
from qtool.runtime.decode.beside import LowRankOps, has_low_rank, without_low_rank
from qtool.runtime.decode.ops import DecodeOps
from qtool.runtime.decode.weights import DecoderWeights
from qtool.runtime.modules import QuantizedEmbedding, QuantizedWeight
from qtool.runtime.spread import draw_alike

Mode = Literal["auto", "always", "never"]
_MODE: ContextVar[Mode] = ContextVar("qtool_runner", default="auto")
_LOG = logging.getLogger(__name__)

GRAPHS_ON = "cuda"
"""Type of the devices on which a step of torch's operations costs no Python."""
NOT_HERE = "what runs the model's weights has no faster steps on this device."
OWN_ARGUMENTS = {
    *("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"),
}
"""Of `_sample`: what it doesn't pass on to the model."""
KNOWN_ARGUMENTS = {
    *("attention_mask", "cache_position", "logits_to_keep"),
    *("past_key_values", "position_ids", "use_cache"),
}
"""Of the model's forward: with others its output would depend on what the runner doesn't see."""


@contextlib.contextmanager
def use_runner(mode: Mode) -> Iterator[None]:
    """Say inside the block whether `generate` uses the runner.

    "auto": where a step costs no Python, on a card or by the `cpu` backend, unless $QTOOL_RUNNER is
    0; "always": on a CPU by torch as well; "never".
    """
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


@dataclass(frozen=True, slots=True)
class _Made:
    """What was made for one model: it holds while the weights stay what and where they are."""

    fingerprint: tuple[Any, ...]
    decoder: SharedRunner | str
    """Or why there is none."""


_MADE: "weakref.WeakKeyDictionary[nn.Module, _Made]" = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def accelerate(model: CausalModel) -> CausalModel:
    """Let `model.generate` use the runner, and a model without parameters say what it is.

    Returns:
        The model, of a class of the same name.
    """
    kind: Any = type(model)
    if not getattr(kind, "_qtool_runner", False):
        model.__class__ = _accelerated(kind)
    return model


@functools.cache
def _accelerated(base: Any) -> Any:
    """Return the subclass."""

    @functools.wraps(base._apply)
    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved = base._apply(self, *args, **kwargs)
        made = _MADE.get(self)
        if made is not None and made.fingerprint != _fingerprint(self):
            _MADE.pop(self, None)  # frees cache, graphs and fused weights where the model was
        return moved

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        _, _, *state = base.__reduce_ex__(self, protocol)
        return _empty, (base,), *state

    members = {
        "_apply": _apply,
        "__reduce_ex__": __reduce_ex__,
        "device": property(_device_of),
        "dtype": property(_dtype_of),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_qtool_runner": True,
    }
    if hasattr(base, "_sample"):
        members |= _generation(base)
    return type(base.__name__, (base,), members)


def _generation(base: Any) -> dict[str, Any]:
    """Return the methods of a model that generates."""

    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        draw_alike(self)
        if kwargs.get("past_key_values") is None:
            return base.generate(self, *args, **kwargs)
        with use_runner("never"):  # the caller's cache is to be filled
            return base.generate(self, *args, **kwargs)

    @functools.wraps(base._sample)
    def _sample(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        decoder = _why_not_call(self, input_ids, kwargs) or _decoder(self)
        if isinstance(decoder, SharedRunner):
            reason = _why_not_decoder(decoder, kwargs["generation_config"].max_length)
            if reason is None:
                try:
                    return sample(decoder, input_ids, kwargs)
                finally:
                    decoder.leave()
            decoder = reason
        _LOG.info("generate runs without the decode runner: %s", decoder)
        return base._sample(self, input_ids, **kwargs)

    return {"generate": generate, "_sample": _sample}


def _device_of(model: nn.Module) -> torch.device:
    """Return where a model is; it may have no parameter but its quantized weights."""
    parameter = next(model.parameters(), None)
    return _quantized(model)[0].device if parameter is None else parameter.device


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's activations: where all is quantized, that of its embedding."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    tables = (part.dtype for part in _quantized(model) if isinstance(part, QuantizedEmbedding))
    return next(floats, None) or next(tables)


def _quantized(model: nn.Module) -> list[QuantizedWeight]:
    return [module for module in model.modules() if isinstance(module, QuantizedWeight)]


def _empty(base: Any) -> Any:
    """Return an object for a pickle to fill, which names the class that transformers has."""
    return object.__new__(_accelerated(base))


def runner_for(model: CausalModel) -> SharedRunner | str:
    """Return what runs a model's steps here, where that is worth it; or why `generate` hasn't it.

    Made once for all who ask; whoever runs it takes weights and operations, or the lock.
    """
    off, elsewhere = _why_not_here(model, model.device)
    if off or elsewhere:
        return "it is switched off." if off else NOT_HERE
    return _decoder(model)


def _why_not_here(model: CausalModel, device: torch.device) -> tuple[bool, bool]:
    """Return whether the runner is switched off, and whether it isn't worth it on a device."""
    mode, backend = _MODE.get(), _backend_of(model)
    worth_it = device.type == (GRAPHS_ON if backend is None else backend.decodes_on)
    off = mode == "never" or (mode == "auto" and settings.runner_is_off())
    return off, mode == "auto" and not worth_it


def _why_not_call(model: CausalModel, input_ids: Tensor, kwargs: Mapping[str, Any]) -> str | None:
    """Return None where the runner can take this call, else a sentence."""
    config = kwargs["generation_config"]
    given = {key: value for key, value in kwargs.items() if value is not None}
    arguments = {key: given[key] for key in given.keys() - OWN_ARGUMENTS}
    off, elsewhere = _why_not_here(model, input_ids.device)
    unknown = sorted(arguments.keys() - KNOWN_ARGUMENTS)
    reasons = {
        "it is switched off.": off,
        NOT_HERE: elsewhere,
        "there is no prompt.": input_ids.numel() == 0,
        "processes are synchronized.": kwargs.get("synced_gpus", False),
        "more than the tokens is to be returned.": config.return_dict_in_generate,
        "there is to be no cache.": not arguments.get("use_cache", config.use_cache),
        "another cache is asked for.": config.cache_implementation not in (None, "dynamic"),
        "the prompt is to be read in chunks.": config.prefill_chunk_size is not None,
        "the model drafts for another one.": getattr(config, "is_assistant", False),
        "there is no limit to the length.": config.max_length is None,
        f"it doesn't know {', '.join(unknown)}.": bool(unknown),
        "the model is on another device.": model.device != input_ids.device,
    }
    found = next((reason for reason, applies in reasons.items() if applies), None)
    return found or _why_not_tensors(input_ids, arguments)


def _why_not_tensors(input_ids: Tensor, arguments: Mapping[str, Any]) -> str | None:
    """The same for arguments that have to be looked at."""
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and not _is_padding(mask, input_ids):
        return "the attention mask hides more than padding on the left."
    expected = torch.arange(input_ids.shape[1], device=input_ids.device)
    if mask is not None:
        expected = expected + (mask.long().sum(1, keepdim=True) - input_ids.shape[1])
    if positions is not None and not (
        positions.shape[-1] == input_ids.shape[1]
        and bool(((positions == expected) | (expected < 0)).all())
    ):
        return "the positions aren't 0, 1, 2 and so on."
    cache = arguments.get("past_key_values")
    return "the cache isn't empty." if cache is not None and cache.get_seq_length() > 0 else None


def _is_padding(mask: Tensor, input_ids: Tensor) -> bool:
    """Return whether a mask hides a part at the left of each prompt, or nothing."""
    if mask.shape != input_ids.shape:
        return False
    seen = mask.bool()
    return bool(seen[:, -1:].all() & (seen[:, 1:] >= seen[:, :-1]).all())


def _why_not_decoder(decoder: SharedRunner, max_length: int) -> str | None:
    """Return a sentence, or None and take the decoder."""
    longest = decoder.weights.longest
    if longest is not None and max_length > longest:
        return f"the model's sliding window of {longest} positions would count."
    return None if decoder.take() else "another thread is using it."


def _decoder(model: CausalModel) -> SharedRunner | str:
    """Return the decoder of this model, or why there is none; made once, by one thread."""
    with _MAKING:
        fingerprint, made = _fingerprint(model), _MADE.get(model)
        if made is None or made.fingerprint != fingerprint:
            made = None
            _MADE.pop(model, None)  # frees the old weights before there are new ones
            decoder: SharedRunner | str | None = llama.why_not(model)
            if decoder is None:
                weights = llama.weights_of(model)
                backend = _backend_of(model)
                ops = _ops_of(backend, weights)
                decoder = SharedRunner(weights, ops) if ops else "the kernels can't run its heads."
            made = _MADE[model] = _Made(fingerprint, decoder)
        return made.decoder


def _ops_of(backend: KernelBackend | None, weights: DecoderWeights) -> DecodeOps | None:
    """Return what runs these weights, and what adapters have beside them; None: nothing does."""
    runs = backend or DENSE
    if not has_low_rank(weights):
        return runs.decode_ops(weights)
    ops = runs.decode_ops(without_low_rank(weights))
    return None if ops is None else LowRankOps(ops)


def _backend_of(model: CausalModel) -> KernelBackend | None:
    """Return the best of the backends that run a model's weights; None: none is quantized."""
    chosen = (module.choose_backend() for module in _quantized(model))
    return max(chosen, key=lambda backend: backend.priority, default=None)


def _fingerprint(model: CausalModel) -> tuple[Any, ...]:
    """Return what changes if a weight is changed, moved or replaced, a hook set, training begun.

    Where the parts of a quantized weight wait doesn't matter: making the decoder changes that.
    """
    modules, packed = list(model.modules()), _quantized(model)
    others = (module for module in modules if not isinstance(module, QuantizedWeight))
    buffers = (buffer for module in others for buffer in module.buffers(recurse=False))
    tensors = [*model.parameters(), *buffers]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    return (
        *((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors),
        *((module.contents, module.device) for module in packed),
        *(hooks, model.training),
    )
