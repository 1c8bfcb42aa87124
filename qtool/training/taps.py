"""Taps: what passes through the parts of each block is seen, and may be another model's instead.

Attention runs as written here (transformers lets a function take its place), so that scores, maps
and what they gather can be tapped too, in every family whose attention is one of transformers'.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qtool.base import CausalModel, ModelAdapter
from qtool.errors import ModelError

Signal = Literal["scores", "map", "context", "attention", "mlp", "block"]
"""Of a block: Q K^T before and after softmax (`map`), what the map gathers of the values, what
attention and the MLP add to the stream, and the block's output."""
TAPPED, UNTAPPED = "qtool_tapped", "eager"
HIDDEN = -1e2
"""What is added to scores that are below it is a mask: such scores count as zero."""


@dataclass(slots=True)
class Tap:
    """What passed through one block when it last ran."""

    seen: dict[Signal, Tensor] = field(default_factory=dict)
    source: "Tap | None" = None
    """Whose signals may take the place of this block's."""
    takes: frozenset[Signal] = frozenset()
    """Which do."""
    cuts: frozenset[int] = frozenset()
    """Of the linears that read a block's input first, in their order: those that pass no gradient
    on to it."""

    def pass_on(self, name: Signal, value: Tensor) -> Tensor:
        """Note a signal; return it, or the source's where that is to be taken."""
        self.seen[name] = value
        if name not in self.takes or self.source is None:
            return value
        return self.source.seen[name].detach().to(value.dtype)


def tap_blocks(model: CausalModel, places: ModelAdapter) -> list[Tap]:
    """Tap all blocks of a model; the taps stay in it.

    Args:
        model: Of transformers.
        places: What its parts are called.

    Raises:
        ModelError: the family's attention can't be replaced, or nobody has said which linears
            add to the stream.
    """
    if places.residual is None:
        raise ModelError(
            f"It isn't known which linears of a {model.config.model_type!r} add to the stream, so "
            "its blocks can't be followed. Say so in its file (`residual`, "
            "docs/adding-a-model.md), or set the weights of losses but `logits` to 0."
        )
    _attend_here(model)
    taps = []
    for block in model.get_submodule(places.blocks):
        tap = Tap()
        _tap(block, places.linears, places.residual, tap)
        taps.append(tap)
    return taps


def _attend_here(model: CausalModel) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(TAPPED, _attend)
    AttentionMaskInterface.register(TAPPED, ALL_MASK_ATTENTION_FUNCTIONS[UNTAPPED])
    model.set_attn_implementation(TAPPED)
    if getattr(model.config, "_attn_implementation", None) != TAPPED:
        raise ModelError(
            f"The attention of a {model.config.model_type!r} is its own and can't be tapped. Set "
            "the weights of losses but `logits` to 0."
        )


def _tap(
    block: nn.Module, linears: Sequence[Sequence[str]], residual: tuple[str, str], tap: Tap
) -> None:
    readers = linears[0]
    attention: Any = block.get_submodule(readers[0].rpartition(".")[0])
    attention.qtool_tap = tap
    for number, name in enumerate(readers):
        block.get_submodule(name).register_forward_pre_hook(_cut(tap, number))
    for signal, name in zip(("attention", "mlp"), residual, strict=True):
        block.get_submodule(name).register_forward_hook(_passing(tap, signal))
    block.register_forward_hook(_passing(tap, "block"))


def _cut(tap: Tap, number: int) -> Any:  # noqa: ANN401
    def hook(_module: nn.Module, inputs: Sequence[Any]) -> Any:  # noqa: ANN401
        return (inputs[0].detach(), *inputs[1:]) if number in tap.cuts else None

    return hook


def _passing(tap: Tap, signal: Any) -> Any:  # noqa: ANN401
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
        if isinstance(output, Tensor):
            return tap.pass_on(signal, output)
        return (tap.pass_on(signal, output[0]), *output[1:])

    return hook


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as `eager` does, each (batch, heads, tokens, head_dim); signals go through the tap."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(
            "Attention with capped scores or sinks can't be tapped. Set the weights of losses but "
            "`logits` to 0."
        )
    tap: Tap = getattr(module, "qtool_tap", None) or Tap()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if attention_mask is None:
        masked, clean = scores, scores
    else:
        mask = attention_mask[..., : key.shape[-2]]
        masked, clean = scores + mask, scores.masked_fill(mask < HIDDEN, 0.0)
    tap.pass_on("scores", clean)
    chances = masked.softmax(-1, dtype=torch.float32).to(query.dtype)
    chances = tap.pass_on("map", chances)
    context = tap.pass_on("context", chances @ value)
    return context.transpose(1, 2).contiguous(), chances


def intervene(
    taps: Iterable[Tap], takes: frozenset[Signal], cuts: frozenset[int] = frozenset()
) -> None:
    """Let the sources' signals take the place of these blocks', from now on.

    Args:
        taps: Of the student.
        takes: Which signals; none: the student runs by itself.
        cuts: See `Tap`.
    """
    for tap in taps:
        tap.takes, tap.cuts = takes, cuts


def relative_error(found: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Return squared errors over squares of what is wanted, by sample and summed: a scalar.

    Args:
        found: (samples, ...) float.
        wanted: Likewise.
        counts: Broadcastable to it: 0 where nothing is asked.
    """
    target = wanted.float() * counts
    error = ((found.float() * counts - target) ** 2).flatten(1).sum(-1)
    return (error / target.square().flatten(1).sum(-1).clamp_min(math.ulp(1.0))).sum()


def errors_of(
    taps: Sequence[Tap], sources: Sequence[Tap], weights: Mapping[Signal, float], seen: Tensor
) -> Tensor:
    """Return the relative errors of signals, weighted, averaged over blocks, summed over samples.

    Args:
        taps: Of the student, which has run.
        sources: Of the original, likewise.
        weights: By signal.
        seen: (samples, length) bool: tokens that count.
    """
    total = torch.zeros((), device=seen.device)
    tokens, rows = seen.unsqueeze(-1).float(), seen[:, None, :, None].float()
    for name, weight in weights.items():
        counts = rows if name in ("scores", "map", "context") else tokens
        for tap, source in zip(taps, sources, strict=True):
            error = relative_error(tap.seen[name], source.seen[name], counts)
            total = total + error * (weight / len(taps))
    return total
