"""Rank-adaptive LoRA: each linear gets the rank that its quantization error asks for.

RA-LoRA is Kim et al. 2024 (Findings of ACL, 2024.findings-acl.933), of which only the abstract
could be read: ranks by an analysis of subspaces, for 2-bit bases. All that follows is ours. With
E = W - Wq and H the moments of a linear's inputs, the singular values of E H^(1/2) say exactly what
each rank takes away of its output error; what an error costs is told by the gradient of the loss.
The ranks share one budget, that of plain LoRA of the same `rank`. It begins at the best low-rank
part of the error, as LoftQ does without weights for inputs (arXiv 2310.08659), or at zero.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.checkpoint.adapter import RANK_DOWN, RANK_UP, LayerAdapter
from qtool.checkpoint.manifest import codec
from qtool.core.low_rank import Directions, allot_ranks, best_directions
from qtool.errors import MethodError
from qtool.recipe.values import Number
from qtool.training.adapters import Adaptable, AdapterKind, Installed
from qtool.training.adapters._analysis import passes
from qtool.training.adapters.lora import install_lora


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAdaptiveOptions:
    """How ranks are chosen, and where they begin."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """The budget: as many parameters as LoRA with this rank in every linear."""
    min_rank: Annotated[int, Field(ge=0)] = 2
    max_rank: Annotated[int, Field(ge=1)] = 64
    step: Annotated[int, Field(ge=1)] = 2
    """Ranks are granted so many at a time."""
    analysis: Literal["error", "gradient"] = "error"
    """Of the quantization error, which needs the original; or of the gradient of each weight."""
    start: Literal["error", "zero"] = "error"
    """Where learning begins; `error` goes with the analysis of that name."""
    damping: Annotated[Number, Field(ge=1e-6, le=1)] = 0.01


def _install(what: Adaptable, options: RankAdaptiveOptions) -> Installed:
    if options.analysis == "error" and what.original is None:
        raise MethodError(
            "ra-lora looks at the quantization error and needs the original: give --original "
            "MODEL, or --set analysis=gradient, which does without."
        )
    energies, starts = dict[str, Tensor](), dict[str, Directions]()
    costs = {name: sum(linear.entry.shape) for name, linear in what.linears.items()}
    by_gradient = options.analysis == "gradient"
    what.tell("analysing layers")
    for name, seen in passes(what, gradients=by_gradient):
        if seen.gradient is not None:
            found = best_directions(seen.gradient, None, options.max_rank, options.damping)
            energies[name] = found.energies.cpu()
            continue
        moments = seen.moments / max(1, seen.tokens)
        found = best_directions(_error(what, name), moments, options.max_rank, options.damping)
        outputs, _ = what.linears[name].entry.shape
        energies[name] = seen.gain(outputs) * found.energies.cpu()
        starts[name] = Directions(found.energies.cpu(), found.up.cpu(), found.down.cpu())
    limits = (min(options.min_rank, options.rank), options.max_rank, options.step)
    ranks = allot_ranks(energies, costs, options.rank * sum(costs.values()), limits)
    begun: dict[str, LayerAdapter] = {}
    if options.start == "error" and not by_gradient:
        begun = {
            name: {RANK_DOWN: found.down[: ranks[name]], RANK_UP: found.up[:, : ranks[name]]}
            for name, found in starts.items()
        }
    return install_lora(what, ranks, 1.0, begun)


@torch.no_grad()
def _error(what: Adaptable, name: str) -> Tensor:
    """Return what quantizing has taken away, (out_features, in_features) float32."""
    assert what.original is not None
    stored = what.linears[name].stored()
    weight = codec(stored.format).dequantize(stored, torch.float32)
    return what.original(name).to(weight.device) - weight


ADAPTER = AdapterKind(
    summary="Rank-adaptive LoRA: ranks, and where they begin, by the quantization error.",
    options=RankAdaptiveOptions,
    install=_install,
    learning_rate=1e-3,
)
