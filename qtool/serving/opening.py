"""What runs a loaded model's sequences, and how many of which length there is room for."""

import logging
from dataclasses import dataclass

import torch

from qtool.data.windows import positions_of
from qtool.errors import BackendError
from qtool.integrations.transformers.generate import runner_for
from qtool.integrations.transformers.int8_cache import keep_as_wanted
from qtool.integrations.transformers.sampling import SharedRunner
from qtool.modeling.load import LoadedModel
from qtool.runtime.decode.cache import bytes_per_token, wanted_kv_cache
from qtool.runtime.decode.slots import SlotRunner
from qtool.runtime.decode.weights import DecoderWeights
from qtool.serving.decoders import ForwardDecoder, RunnerDecoder, SlotDecoder
from qtool.serving.served import ServedModel
from qtool.settings import KvCache
from qtool.wording import gigabytes

_LOG = logging.getLogger(__name__)
USUAL_LENGTH, RUNNER_SLOTS, CPU_SLOTS = 4096, 16, 4
LENGTH_STEP = 64
LEFT_FREE = 2 * 2**30
"""Bytes of a card that prompts need while they are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """How many sequences run together, and how long they may be."""

    slots: int | None = None
    """None: 16 by the decode runner on a card, else 4."""
    max_length: int | None = None
    """Tokens of prompt and answer; None: 4096, or what the model has positions for."""


def open_decoder(loaded: LoadedModel, options: DecoderOptions = DecoderOptions()) -> SlotDecoder:
    """Return what runs sequences of a model.

    Raises:
        BackendError: the model has fewer positions, or there is no room for keys and values.
    """
    model = loaded.model
    longest = positions_of(model.config)
    runner = runner_for(model)
    if isinstance(runner, SharedRunner) and runner.weights.longest is not None:
        longest = min(longest or runner.weights.longest, runner.weights.longest)
    length = options.max_length or min(USUAL_LENGTH, longest or USUAL_LENGTH)
    if longest is not None and length > longest:
        raise BackendError(
            f"{loaded.name} has {longest} positions, so a context of {length} tokens is too long. "
            f"Give --max-model-len {longest} or less."
        )
    kind = wanted_kv_cache()
    if not isinstance(runner, SharedRunner):
        keep_as_wanted(model)
        _LOG.info("sequences run one by one, without the decode runner: %s", runner)
        return ForwardDecoder(model, max_length=length, slots=options.slots or CPU_SLOTS)
    on_card = runner.weights.final_norm.device.type == "cuda"
    slots = options.slots or (RUNNER_SLOTS if on_card else CPU_SLOTS)
    _check_room(runner.weights, slots, length, kind)
    slot_runner = SlotRunner(
        runner.weights, runner.ops, max_length=length, slots=slots, kv_cache=kind
    )
    return RunnerDecoder(slot_runner)


def served_model(loaded: LoadedModel) -> ServedModel:
    """Return what is said of a model to those who ask."""
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    return ServedModel(loaded.name, loaded.tokenizer, frozenset(loaded.stop_ids), vocabulary)


def _check_room(weights: DecoderWeights, slots: int, length: int, kind: KvCache = "auto") -> None:
    device = weights.final_norm.device
    if device.type != "cuda":
        return
    per_token = bytes_per_token(weights, kind)
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info(device)[0] - LEFT_FREE
    if slots * length * per_token > room:
        most = max(0, room // (slots * per_token)) // LENGTH_STEP * LENGTH_STEP
        less = ", or --kv-cache int8" if kind == "auto" else ""
        raise BackendError(
            f"Keys and values of {slots} sequences of {length} tokens take "
            f"{gigabytes(slots * length * per_token)}, and the card has {gigabytes(max(0, room))} "
            f"for them. Give --max-model-len {most} or less, or fewer --slots{less}."
        )
