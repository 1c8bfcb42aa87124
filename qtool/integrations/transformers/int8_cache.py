"""An int8 key-value cache for models that transformers runs: attention sees what it would hold.

Transformers' own cache stays what it is, so this saves no memory: it shows what the decode runner's
cache does to a model, wherever the model runs and whatever asks it for logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel
from qtool.errors import BackendError
from qtool.runtime.decode.cache import dequantized_rows, quantized_rows, wanted_kv_cache

INT8_ATTENTION, PLAIN_ATTENTION = "qtool_int8_cache", "sdpa"


def keep_as_wanted(model: CausalModel) -> None:
    """Let a model's attention see keys and values as the wanted cache holds them, from now on.

    Raises:
        BackendError: that is int8, and the model brings an attention of its own.
    """
    if wanted_kv_cache() == "auto":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    used = getattr(model.config, "_attn_implementation", None)
    if used == INT8_ATTENTION:
        return
    if used != PLAIN_ATTENTION:
        raise BackendError(
            f"The keys and values of a {model.config.model_type} can't be seen as int8: its "
            f"attention is {used!r}, not {PLAIN_ATTENTION!r}. Leave out --kv-cache."
        )
    AttentionInterface.register(INT8_ATTENTION, _attend)
    AttentionMaskInterface.register(INT8_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[PLAIN_ATTENTION])
    anything: Any = model
    anything.set_attn_implementation(INT8_ATTENTION)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as ever, to keys and values (batch, heads, tokens, head_dim) of the cache."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[PLAIN_ATTENTION]
    return attend(module, query, _as_cached(key), _as_cached(value), attention_mask, **options)


def _as_cached(x: Tensor) -> Tensor:
    with torch.no_grad():
        return dequantized_rows(*quantized_rows(x), x.dtype)
