"""AlphaTuning: planes are frozen, and the first plane's scales learn.

Source: Kwon et al. 2022, "AlphaTuning: Quantization-Aware Parameter-Efficient Adaptation of
Large-Scale Pre-Trained Language Models" (EMNLP Findings). The gradient of a scale is there divided
by the size of its group, which AdamW cancels; it isn't here. Ours: a scale learns by its relative
change, so one rate suits all layers, and decay pulls to the base; groups of any size; more planes,
offsets, or one change for a whole row.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qtool.base import ModelPart
from qtool.checkpoint.adapter import PLANE_OFFSETS, PLANE_SCALES, LayerAdapter
from qtool.core import grouping
from qtool.core.activations import fake_quantize
from qtool.core.autograd import AutogradContext
from qtool.core.learned import mean_gaps, planes_sums, planes_values, with_gradient
from qtool.core.packing import planes_to_codes
from qtool.formats._in_planes import in_planes
from qtool.formats._parts import codes_in_groups
from qtool.scheme import MAX_BITS
from qtool.training.adapters import Adaptable, AdapterKind, Installed


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaOptions:
    """What learns of each weight."""

    planes: Annotated[int, Field(ge=1, le=MAX_BITS)] = 1
    """Scales of so many planes, from the first on; more than there are means all."""
    offsets: bool = False
    """Offsets learn too, where the format has them."""
    per_row: bool = False
    """One relative change for all groups of a row: fewer parameters."""


class RescaledLinear(nn.Module):
    """Stands in for a quantized linear while its scales learn; packed planes are all it holds.

    A dense weight is there during its product alone, forwards and once more backwards.
    """

    def __init__(self, linear: ModelPart, options: AlphaOptions) -> None:
        """Begin at a quantized linear.

        Args:
            linear: What has `stored()`, its weight, and `bias`.
            options: What learns.

        Raises:
            SchemeError: its format has no scales that could learn.
        """
        super().__init__()
        weight = in_planes(linear.stored())
        self.scheme, self.shape, self.bias = weight.scheme, weight.shape, linear.bias
        self.activation = linear.entry.activation
        """How inputs are quantized while the layer runs; gradients pass as if they weren't."""
        self.planes = weight.parts["bit_planes"]
        scales = grouping.to_stored(weight.parts[PLANE_SCALES].float(), self.scheme)
        self.scales, self.offsets = scales, torch.zeros_like(scales[0])
        if PLANE_OFFSETS in weight.parts:
            self.offsets = grouping.to_stored(weight.parts[PLANE_OFFSETS].float(), self.scheme)
        count = min(options.planes, len(scales))
        width = 1 if options.per_row else scales.shape[2]
        self.moves = nn.Parameter(scales.new_zeros(count, scales.shape[1], width))
        """(planes, rows, groups, or 1): relative changes of scales."""
        learns_offsets = options.offsets and PLANE_OFFSETS in weight.parts
        shifts = torch.zeros_like(self.offsets[:, :width]) if learns_offsets else None
        self.shifts = None if shifts is None else nn.Parameter(shifts)
        """(rows, groups, or 1): changes of offsets, in mean distances of levels."""

    def scales_now(self) -> Tensor:
        """Return all scales (num_bits, rows, groups), rounded as stored; gradients pass."""
        learned = (self.scales[: len(self.moves)] * (1 + self.moves)).clamp(min=0)
        rounded = with_gradient(learned.detach().half().float(), learned)
        return torch.cat([rounded, self.scales[len(self.moves) :]])

    def offsets_now(self) -> Tensor:
        """Return the offsets (rows, groups), likewise."""
        if self.shifts is None:
            return self.offsets
        learned = self.offsets + self.shifts * mean_gaps(self.scales)
        return with_gradient(learned.detach().half().float(), learned)

    def codes(self) -> Tensor:
        """Return the codes in rows of groups, unpacked for a moment."""
        return codes_in_groups(planes_to_codes(self.planes, self.shape.in_features), self.scheme)

    def dense(self, scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
        """Return the weight, (out_features, in_features) float32."""
        values = planes_values(scales, offsets, codes)
        joined = grouping.join(values, self.scheme.grouped_length(self.shape))
        return grouping.to_rows(joined, self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias: (..., in_features) -> (..., out_features)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if self.activation is not None:
            x = with_gradient(fake_quantize(x.detach(), self.activation), x)
        y: Tensor = _Rescaled.apply(x, self.scales_now(), self.offsets_now(), self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def adapter(self) -> LayerAdapter:
        """Return what an adapter stores: the learned scales and offsets, float16."""
        scales = self.scales_now()[: len(self.moves)].half()
        found = {PLANE_SCALES: grouping.to_stored(scales, self.scheme)}
        if self.shifts is not None:
            found[PLANE_OFFSETS] = grouping.to_stored(self.offsets_now().half(), self.scheme)
        return found


class _Rescaled(torch.autograd.Function):
    """x @ W.T, of which neither W nor its gradient is kept."""

    @staticmethod
    def forward(
        ctx: AutogradContext, x: Tensor, scales: Tensor, offsets: Tensor, layer: ModelPart
    ) -> Tensor:
        ctx.save_for_backward(x, scales, offsets)
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(scales, offsets, layer.codes()).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        (x, scales, offsets), layer = ctx.saved_tensors, ctx.layer
        codes, into = layer.codes(), None
        if ctx.needs_input_grad[0]:
            into = grad @ layer.dense(scales, offsets, codes).to(grad.dtype)
        of_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float()
        rows = grouping.to_rows(of_weight, layer.scheme)
        sums = planes_sums(grouping.split(rows, layer.scheme.group_size), codes, len(scales))
        return into, sums[:-1], sums[-1], None


def _install(what: Adaptable, options: AlphaOptions) -> Installed:
    layers = {name: RescaledLinear(linear, options) for name, linear in what.linears.items()}
    for name, layer in layers.items():
        _put(what.model, name, layer)

    def remove() -> None:
        for name, linear in what.linears.items():
            _put(what.model, name, linear)

    return Installed(
        parameters=[parameter for layer in layers.values() for parameter in _learned(layer)],
        stored=lambda: {name: layer.adapter() for name, layer in layers.items()},
        remove=remove,
    )


def _learned(layer: RescaledLinear) -> list[nn.Parameter]:
    return [layer.moves] if layer.shifts is None else [layer.moves, layer.shifts]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


ADAPTER = AdapterKind(
    summary="AlphaTuning: the scales of the first plane learn; merging is exact.",
    options=AlphaOptions,
    install=_install,
    learning_rate=1e-2,
)
