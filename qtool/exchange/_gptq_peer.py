"""GPTQModel's own decoding of a layer, where it is installed; else ours."""

import contextlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.exchange._compare import OWN_READER

GPTQ_LIBRARY = "gptqmodel"


@cache
def _peer() -> tuple[Any, ...] | None:
    """Return GPTQModel's linear and its conversion of version 1; None: it can't be imported."""
    if importlib.util.find_spec(GPTQ_LIBRARY) is None:
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it greets
            from gptqmodel.nn_modules.qlinear.torch import TorchLinear
            from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    except Exception:  # noqa: BLE001 - it needs newer libraries, or a card
        return None
    return TorchLinear, convert_gptq_v1_to_v2_format_module


def peer_name() -> str:
    """Return whose functions decode."""
    return f"{GPTQ_LIBRARY} {importlib.metadata.version(GPTQ_LIBRARY)}" if _peer() else OWN_READER


def decode_gptq(
    parts: Mapping[str, Tensor], tensor: QuantizedTensor, version: int
) -> Tensor | None:
    """Return a layer as GPTQModel decodes it; None: that isn't installed.

    (out_features, in_features) float32. Its scales are given in float32, in which products are
    exact.
    """
    found = _peer()
    if found is None:
        return None
    linear, to_version_2 = found
    scheme, shape = tensor.scheme, tensor.shape
    module = linear(
        bits=scheme.num_bits,
        group_size=scheme.group_size or -1,
        sym=scheme.symmetric,
        desc_act="input_order" in tensor.parts,
        in_features=shape.in_features,
        out_features=shape.out_features,
        bias=False,
    )
    for name, values in parts.items():
        setattr(module, name, values.float() if values.is_floating_point() else values.clone())
    if version == 1:
        to_version_2(module, scheme.num_bits, torch.int32)
    return module.dequantize_weight().T.float()
