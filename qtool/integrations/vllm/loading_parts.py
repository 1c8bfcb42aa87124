"""Between vLLM's loader and `Incoming`: empty parameters whose loaders collect tensors."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.parameter import BasevLLMParameter

from qtool.errors import BackendError
from qtool.formats._dtypes import dtype_of
from qtool.integrations.vllm.incoming import (
    Incoming,
    RankWeight,
    dummy_parts,
    torchs_own_defaults,
)
from qtool.integrations.vllm.slices import source_number

VllmLayer = Any
"""A module of vLLM's; what these have is in no type here."""
DUMMY = "dummy"
"""vLLM's name for weights that no file is read for."""


def expect(layer: VllmLayer, incoming: Incoming, dtype: torch.dtype) -> None:
    """Give a layer of vLLM one empty parameter for each part that the checkpoint holds of it.

    vLLM finds them by the names of tensors, and hands these to their loaders as they are stored.
    """

    def loader_of(part: str) -> Any:
        def load(param: Tensor, loaded: Tensor, shard_id: object = None) -> None:
            del param
            incoming.add(source_number(shard_id, len(incoming.sources)), part, loaded)

        return load

    for part in incoming.part_names():
        specs = [each.entry.layout() for each in incoming.sources if each.entry is not None]
        stored = next((layout[part].dtype for layout in specs if part in layout), None)
        empty = torch.empty(0, dtype=dtype if stored is None else dtype_of(stored))
        layer.register_parameter(part, BasevLLMParameter(empty, weight_loader=loader_of(part)))
    layer.qtool_incoming, layer.qtool_dtype = incoming, dtype
    config = get_current_vllm_config_or_none()
    layer.qtool_dummy = config is not None and config.load_config.load_format == DUMMY


def take(layer: VllmLayer) -> list[RankWeight]:
    """Return the weights that have come, and forget the parameters.

    Raises:
        CheckpointError: tensors are missing.
        BackendError: vLLM loads weights a second time.
    """
    incoming = layer.qtool_incoming
    if incoming is None:
        raise BackendError("qtool's weights are loaded once. Start vLLM again to load others.")
    if layer.qtool_dummy:
        _fill(incoming)
    pieces = incoming.pieces()
    for part in incoming.part_names():
        delattr(layer, part)
    layer.qtool_incoming = None
    return pieces


def _fill(incoming: Incoming) -> None:
    for number, source in enumerate(incoming.sources):
        if source.entry is None:
            raise BackendError(
                f"{source.name} isn't quantized and its neighbours are: vLLM's dummy weights can't "
                "be of both kinds."
            )
        with torchs_own_defaults():
            parts = dummy_parts(source.entry)
        for part, values in parts.items():
            incoming.add(number, part, values)
