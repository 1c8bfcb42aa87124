"""Which linears of a model can have their inputs divided by factors, and what does that.

A factor per channel goes through a norm's weight, through the values of attention (probabilities
act on tokens, and sum to one, so that a bias of the values goes through as well), through a product
with a gate, and through a function that is positively homogeneous, as ReLU is. Rotary embeddings
and norms of queries and keys lie behind these linears, and see what they saw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import ModelConfig, Producer
from qtool.errors import ModelError
from qtool.modeling.source import ModelSource

HOMOGENEOUS = ("relu", "leaky_relu", "linear")
"""Functions with f(s x) = s f(x) for s above zero, as transformers calls them."""
SAYS_FUNCTION = ("activation_function", "hidden_act")
"""Where a configuration says which it is."""
NORM, HEADS, GATE, ACTIVATION = "norm", "heads", "gate", "activation"


@dataclass(frozen=True, slots=True)
class FoldGroup:
    """Linears that share their inputs, and what can divide them."""

    linears: tuple[str, ...]
    """Dotted names."""
    producer: str
    """Dotted name of a norm or of a linear."""
    channel: Tensor
    """(in_features,) int64: which output of the producer makes each input."""
    is_norm: bool = False


def fold_groups(source: ModelSource, block: int) -> Iterator[FoldGroup]:
    """Yield what can be folded in one block; for what can't, see `why_not_foldable`."""
    parsed = source.parsed
    shared: dict[str, FoldGroup] = {}
    for names, producer in _pairs(source):
        linears = tuple(f"{source.adapter.blocks}.{block}.{name}" for name in names)
        if _reason(source, producer, parsed, block) is not None:
            continue
        found = _group(source, linears, producer, parsed, block)
        if found.producer in shared:  # a norm of parallel parts: all or none can be folded
            linears = shared[found.producer].linears + linears
        shared[found.producer] = FoldGroup(linears, found.producer, found.channel, found.is_norm)
    yield from shared.values()


def why_not_foldable(source: ModelSource, linear: str) -> str | None:
    """Return what is in the way of folding a linear's inputs; None: nothing.

    Args:
        source: The model.
        linear: Dotted name.
    """
    start = source.adapter.blocks.count(".") + 2
    parts = linear.split(".")
    block, inner = ".".join(parts[:start]), ".".join(parts[start:])
    if not source.adapter.producers:
        family = source.parsed.model_type
        return (
            f"{linear}: nobody has said what makes its inputs in a {family!r} model. Leave out the "
            "section 'fold', or add `producers` to the file of its family."
        )
    for names, producer in _pairs(source):
        if inner in names:
            reason = _reason(source, producer, source.parsed, int(block.rpartition(".")[2]))
            return None if reason is None else f"{linear}: {reason}"
    return f"{linear} is no linear of the blocks."


def check_foldable(source: ModelSource, names: Sequence[str]) -> None:
    """Check that linears can be folded.

    Args:
        source: The model.
        names: Of linears, as in a block; empty: some of them are to be foldable.

    Raises:
        ModelError: one can't, or none can; says what is in the way.
    """
    linears = names or tuple(group[0] for group in source.adapter.linears)
    first = f"{source.adapter.blocks}.0"
    reasons = [why_not_foldable(source, f"{first}.{name}") for name in linears]
    wrong = [reason for reason in reasons if reason is not None]
    if wrong and (names or len(wrong) == len(linears)):
        raise ModelError(f"The inputs of a linear can't be folded. {wrong[0]}")


def _pairs(source: ModelSource) -> Iterator[tuple[tuple[str, ...], Producer]]:
    adapter = source.adapter
    if adapter.producers:
        yield from zip(adapter.linears, adapter.producers, strict=True)


def _reason(source: ModelSource, producer: Producer, parsed: ModelConfig, block: int) -> str | None:
    """Return why factors can't go into a producer; None: they can."""
    name = f"{source.adapter.blocks}.{block}.{producer.name}"
    if producer.through == NORM and not getattr(parsed, "do_layer_norm_before", True):
        return f"its inputs, of {name}, are the residual stream as well, and can't be divided."
    if producer.through == ACTIVATION:
        function = next(
            (str(getattr(parsed, key)) for key in SAYS_FUNCTION if hasattr(parsed, key)), "unknown"
        )
        if function not in HOMOGENEOUS:
            return (
                f"its inputs come from {name} through {function}, which doesn't let a factor "
                f"through; {', '.join(HOMOGENEOUS)} do."
            )
    if not source.has(f"{name}.weight"):
        return f"{name}, which makes its inputs, has no weight that could take factors."
    return None


def _group(
    source: ModelSource,
    linears: tuple[str, ...],
    producer: Producer,
    parsed: ModelConfig,
    block: int,
) -> FoldGroup:
    width = source.weight_shape(linears[0]).in_features
    name = f"{source.adapter.blocks}.{block}.{producer.name}"
    inputs = torch.arange(width)
    if producer.through == NORM:
        return FoldGroup(linears, name, inputs, is_norm=True)
    rows = source.weight_shape(name).out_features
    if producer.through in (GATE, ACTIVATION):
        return FoldGroup(linears, name, inputs + rows - width)
    heads = parsed.num_attention_heads
    per_head = width // heads
    head, inside = inputs // per_head, inputs % per_head
    if producer.through == HEADS:  # queries, keys and values of a head, then of the next
        return FoldGroup(linears, name, (head + 1) * (rows // heads) - per_head + inside)
    values = rows if rows <= width else (rows - width) // 2  # of queries, keys and values, or alone
    kept = head // (width // values) * per_head + inside
    return FoldGroup(linears, name, kept + rows - values)
