"""LoRA through PEFT: the baseline that other kinds of adapters are measured against.

Source: Hu et al. 2021 (arXiv 2106.09685); on a quantized base, Dettmers et al. 2023 (arXiv
2305.14314).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.base import ModelPart
from qtool.checkpoint.adapter import RANK_DOWN, RANK_UP, LayerAdapter
from qtool.errors import MissingExtraError
from qtool.recipe.values import Number
from qtool.training.adapters import Adaptable, AdapterKind, Installed

IN_PEFT = "qtool"
"""What PEFT calls the adapter while it learns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """What is put beside each linear."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[Number, Field(gt=0)] | None = None
    """What is added is multiplied by alpha / rank; None: by 1."""


def install_lora(
    what: Adaptable, ranks: Mapping[str, int], scale: float, starts: Mapping[str, LayerAdapter]
) -> Installed:
    """Put low-rank adapters of PEFT beside linears.

    Args:
        what: The model.
        ranks: By linear; none where it is 0.
        scale: What is added is multiplied by it while it learns; what is stored has it in it.
        starts: `down` and `up` to begin at, by linear; others begin at a `down` that is drawn and
            an `up` of zeros, which changes nothing.

    Raises:
        MissingExtraError: PEFT isn't installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # slow, and an extra
    except ImportError:
        raise MissingExtraError("LoRA", "adapt") from None
    chosen = {name: rank for name, rank in ranks.items() if rank}
    highest = max(chosen.values())
    config = LoraConfig(
        r=highest,
        lora_alpha=scale * highest,
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in chosen.items()},
        alpha_pattern={f"^{re.escape(name)}$": scale * rank for name, rank in chosen.items()},
        target_modules=list(chosen),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(what.seed)
        inject_adapter_in_model(config, what.model, IN_PEFT)
    layers = {name: what.model.get_submodule(name) for name in chosen}
    for name, layer in layers.items():
        _begin(layer, starts.get(name), scale)

    def remove() -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(what.model.get_submodule(parent), child, layer.get_base_layer())

    return Installed(
        parameters=[parameter for layer in layers.values() for parameter in _learned(layer)],
        stored=lambda: {name: _stored(layer, scale) for name, layer in layers.items()},
        remove=remove,
        notes={"ranks": dict(ranks)},
    )


def _learned(layer: ModelPart) -> list[nn.Parameter]:
    return [layer.lora_A[IN_PEFT].weight, layer.lora_B[IN_PEFT].weight]


@torch.no_grad()
def _begin(layer: ModelPart, start: LayerAdapter | None, scale: float) -> None:
    down, up = _learned(layer)
    for parameter in (down, up):
        parameter.data = parameter.data.to(layer.get_base_layer().device).float()
        parameter.requires_grad_()
    if start is not None:
        down.copy_(start[RANK_DOWN])
        up.copy_(start[RANK_UP] / scale)


@torch.no_grad()
def _stored(layer: ModelPart, scale: float) -> dict[str, Tensor]:
    down, up = _learned(layer)
    return {RANK_DOWN: down.half(), RANK_UP: (up * scale).half()}


def _install(what: Adaptable, options: LoraOptions) -> Installed:
    scale = 1.0 if options.alpha is None else options.alpha / options.rank
    return install_lora(what, dict.fromkeys(what.linears, options.rank), scale, {})


ADAPTER = AdapterKind(
    summary="LoRA through PEFT: one rank for all linears; the baseline.",
    options=LoraOptions,
    install=_install,
    learning_rate=1e-3,
)
