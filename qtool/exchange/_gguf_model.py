"""What llama.cpp calls a model, its sizes and its metadata, or what it would compute otherwise.

Keys are those of llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtool.base import ModelConfig
from qtool.exchange._gguf_about import llama3_factors
from qtool.exchange._gguf_names import ARCHITECTURES, Architecture, Dimensions
from qtool.wording import shown

SCALED = "llama3"
UNSCALED = "default"
MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModel:
    """A model by its config.json."""

    name: str
    """llama.cpp's, of the architecture."""
    architecture: Architecture
    parsed: Any
    """The configuration with transformers' defaults."""
    sizes: Dimensions


def model_types() -> tuple[str, ...]:
    """Return transformers' names of what can be written."""
    return tuple(kind for each in ARCHITECTURES.values() for kind in each.model_types)


def described(parsed: ModelConfig) -> DescribedModel | None:
    """Return what llama.cpp calls a model, by transformers' configuration; None: nothing here."""
    kind = parsed.model_type
    name = next((name for name, each in ARCHITECTURES.items() if kind in each.model_types), None)
    if name is None:
        return None
    heads = parsed.num_attention_heads
    sizes = Dimensions(
        blocks=parsed.num_hidden_layers,
        vocabulary=parsed.vocab_size,
        width=parsed.hidden_size,
        inner=parsed.intermediate_size,
        heads=heads,
        key_heads=parsed.num_key_value_heads or heads,
        head=getattr(parsed, "head_dim", None) or parsed.hidden_size // heads,
    )
    return DescribedModel(name=name, architecture=ARCHITECTURES[name], parsed=parsed, sizes=sizes)


def _positions(parsed: ModelConfig) -> tuple[str, float, Mapping[str, Any]]:
    """Return how positions are scaled, the base of their frequencies, and the parameters."""
    found = getattr(parsed, "rope_parameters", None) or getattr(parsed, "rope_scaling", None) or {}
    base = found.get("rope_theta") or getattr(parsed, "rope_theta", None) or 10000.0
    return str(found.get("rope_type") or found.get("type") or UNSCALED), float(base), found


def why_computed_otherwise(model: DescribedModel) -> str | None:
    """Return what llama.cpp would compute otherwise, as a clause; None: nothing."""
    parsed, (kind, _, rope) = model.parsed, _positions(model.parsed)
    if kind not in (UNSCALED, SCALED) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its positions are scaled in a way ({shown(kind)}) that isn't written"
    if kind == SCALED and not model.architecture.is_permuted:
        return f"its positions are scaled ({shown(kind)}), which llama.cpp reads of llama only"
    if parsed.hidden_act not in ("silu", "swish"):
        return f"its activation is {shown(parsed.hidden_act)}, and silu is meant"
    if parsed.max_position_embeddings > MAX_UINT32:
        return f"it has {parsed.max_position_embeddings} positions, and a file says {MAX_UINT32}"
    window = getattr(parsed, "sliding_window", None)
    slides = getattr(parsed, "use_sliding_window", True) and window is not None
    if slides and window < parsed.max_position_embeddings:
        return f"its attention looks back {window} tokens, and llama.cpp's looks back to the first"
    return None


def rope_factors(model: DescribedModel) -> Tensor | None:
    """Return by what frequencies of positions are divided, (head / 2,) float32; None: nothing."""
    kind, base, rope = _positions(model.parsed)
    return llama3_factors(model.sizes.head, base, rope) if kind == SCALED else None


def model_metadata(model: DescribedModel) -> dict[str, Any]:
    """Return the metadata whose keys begin with the architecture."""
    parsed, sizes = model.parsed, model.sizes
    found = {
        "block_count": sizes.blocks,
        "context_length": parsed.max_position_embeddings,
        "embedding_length": sizes.width,
        "feed_forward_length": sizes.inner,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.key_heads,
        "attention.key_length": sizes.head,
        "attention.value_length": sizes.head,
        "attention.layer_norm_rms_epsilon": float(parsed.rms_norm_eps),
        "rope.dimension_count": sizes.head,
        "rope.freq_base": _positions(parsed)[1],
        "vocab_size": sizes.vocabulary,
    }
    return {f"{model.name}.{key}": value for key, value in found.items()}
