"""Spread a loaded model over the ranks of a tensor-parallel group, in its place.

Queries, keys, values, gate and up are cut by rows: whole key-value heads with their queries; the
output projection and down by columns, the head by rows of the vocabulary. Norms and the embedding
are whole on every rank, and a head that is tied to the embedding.
"""

from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn

from qtool.base import CausalModel, ModelPart, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.errors import BackendError, SchemeError
from qtool.runtime.decode.read_model import why_not
from qtool.runtime.modules import QuantizedLinear, TiedHead
from qtool.runtime.rank_modules import SpreadLinear
from qtool.runtime.tensor_parallel import TensorParallel, even_parts

ROW_UNIT = 16
"""Rows that are kept together where heads don't say how many: a tile of the kernels."""
GROUP = "_qtool_ranks"
"""Attribute of a model that is spread."""
AnyWeight = QuantizedTensor | Tensor
"""A weight that is quantized, or one that isn't."""


def narrow_to(weight: AnyWeight, dim: int, part: range) -> AnyWeight:
    """Return rows (dim 0) or columns of a weight.

    Raises:
        SchemeError: a quantized one can't be cut there.
    """
    if len(part) == weight.shape[dim] and part.start == 0:
        return weight
    if isinstance(weight, Tensor):
        return weight.narrow(dim, part.start, len(part)).contiguous()
    return codec(weight.format).narrow(weight, dim, part.start, len(part))


@torch.no_grad()
def spread_model(
    model: CausalModel, group: TensorParallel | None, *, dtype: torch.dtype | None = None
) -> CausalModel:
    """Leave of a model what this rank has, and bring that to the rank's device, layer by layer.

    Its forward and `generate` then are collective: every rank calls them alike.

    Args:
        model: Loaded, in evaluation mode, whole on each rank; best on the CPU.
        group: Of `tensor_parallel.launched`; None: one process, which has it all.
        dtype: Of activations and what isn't quantized; None: as it is loaded.

    Returns:
        The model.

    Raises:
        BackendError: the decoder doesn't know the model, or it can't be cut so often.
    """
    if group is None:
        return model
    reason = why_not(model)
    if reason is not None:
        raise BackendError(f"The model can't be spread over {group.world_size} ranks: {reason}")
    core: Any = model.model
    for index, layer in enumerate(core.layers):
        if not hasattr(layer.mlp, "down_proj"):
            raise BackendError("Experts aren't spread over ranks: run the model on one card.")
        cut = _Cut(group, f"Layer {index}")
        cut.attention(layer.self_attn)
        cut.mlp(layer.mlp)
        _settle(layer, group.device, dtype)
    if not _is_tied(model):
        _Cut(group, "The head").head(model)
    setattr(model, GROUP, group)
    _settle(model, group.device, dtype)
    return model


def draw_alike(model: CausalModel) -> None:
    """Let ranks that share a model draw the same random numbers: rank 0's; others change nothing.

    `generate` does so as it begins: ranks that choose other tokens would wait for one another.
    """
    group = getattr(model, GROUP, None)
    if group is not None:
        seed = torch.randint(2**62, (1,)).to(group.device)
        torch.manual_seed(int(group.broadcast(seed)))


@dataclass(frozen=True, slots=True)
class _Cut:
    """Cuts the modules of one place for one rank."""

    group: TensorParallel
    place: str

    def attention(self, attention: ModelPart) -> None:
        """Cut by key-value heads."""
        dim, output = attention.head_dim, attention.o_proj
        kv_heads = attention.k_proj.out_features // dim
        queries = attention.q_proj.out_features // kv_heads
        sizes = {"q_proj": queries, "k_proj": dim, "v_proj": dim}
        units = [_unit(getattr(attention, name), 0) for name in sizes]
        each = [*zip(units, sizes.values(), strict=True), (_unit(output, 1), queries)]
        unit = lcm(*(size // gcd(size, width) for size, width in each))
        heads = self._parts(kv_heads, unit, "key-value heads")
        for name, size in sizes.items():
            self._rows(attention, name, _times(heads[self.group.rank], size))
        self._columns(attention, "o_proj", tuple(_times(part, queries) for part in heads))

    def mlp(self, mlp: ModelPart) -> None:
        """Cut by what lies between gate, up and down."""
        unit = lcm(ROW_UNIT, _unit(mlp.down_proj, 1))
        unit = lcm(unit, _unit(mlp.gate_proj, 0), _unit(mlp.up_proj, 0))
        width = mlp.down_proj.in_features
        if -(-width // unit) < self.group.world_size:  # whole tiles are a matter of speed
            unit = lcm(_unit(mlp.down_proj, 1), _unit(mlp.gate_proj, 0), _unit(mlp.up_proj, 0))
        parts = self._parts(width, unit, "columns of down_proj")
        self._rows(mlp, "gate_proj", parts[self.group.rank])
        self._rows(mlp, "up_proj", parts[self.group.rank])
        self._columns(mlp, "down_proj", parts)

    def head(self, model: CausalModel) -> None:
        """Cut by words."""
        head = model.lm_head
        unit, words = lcm(ROW_UNIT, _unit(head, 0)), head.out_features
        parts = even_parts(words, unit, self.group.world_size)
        if parts is None:
            return  # a small vocabulary may as well be everywhere
        self._rows(model, "lm_head", parts[self.group.rank])
        model.lm_head = SpreadLinear(model.lm_head, self.group, tuple(map(len, parts)))

    def _parts(self, total: int, unit: int, what: str) -> tuple[range, ...]:
        parts = even_parts(total, unit, self.group.world_size)
        if parts is None:
            apart = "" if unit == 1 else f", which groups of weights keep together by {unit}"
            raise BackendError(
                f"{self.place} has {total} {what}{apart}: too few for {self.group.world_size} "
                "ranks. Start fewer, or quantize with a smaller group_size."
            )
        return parts

    def _rows(self, parent: ModelPart, name: str, part: range) -> None:
        setattr(parent, name, self._narrowed(getattr(parent, name), 0, part))

    def _columns(self, parent: ModelPart, name: str, parts: tuple[range, ...]) -> None:
        inner = self._narrowed(getattr(parent, name), 1, parts[self.group.rank])
        is_even = len(set(map(len, parts))) == 1
        setattr(parent, name, SpreadLinear(inner, self.group, is_even=is_even))

    def _narrowed(self, module: ModelPart, dim: int, part: range) -> nn.Module:
        bias = module.bias
        if bias is not None and dim == 0:
            bias = narrow_to(bias.detach(), 0, part)
        try:
            quantized = isinstance(module, QuantizedLinear)
            weight = module.tensor() if quantized else module.weight.detach()
            return _linear(module, narrow_to(weight, dim, part), bias)
        except SchemeError as error:
            raise BackendError(
                f"{self.place} can't be spread over {self.group.world_size} ranks: {error}"
            ) from error


def _settle(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Bring a module to a device, its parameters in a dtype; positions keep that of their buffers.

    On a card at once, for what is cut out of columns takes memory of the host until then.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype)
    module.to(device)


def _is_tied(model: CausalModel) -> bool:
    head, table = model.lm_head, model.model.embed_tokens
    return isinstance(head, TiedHead) or (
        isinstance(head, nn.Linear) and head.weight is getattr(table, "weight", None)
    )


def _unit(module: ModelPart, dim: int) -> int:
    """Return at multiples of what a weight can be cut along a dimension."""
    if not isinstance(module, QuantizedLinear):
        return 1
    scheme, names = module.entry.scheme, ("out_features", "in_features")
    size = scheme.group_size or module.entry.shape[dim]
    along = scheme.group_dim == names[dim] and size < module.entry.shape[dim]
    return size if along else 1


def _times(part: range, size: int) -> range:
    return range(part.start * size, part.stop * size)


def _linear(module: ModelPart, weight: AnyWeight, bias: Tensor | None) -> nn.Module:
    """Return a linear like `module` of another weight."""
    linear: nn.Linear | QuantizedLinear
    if isinstance(weight, Tensor):
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
    else:
        entry = replace(module.entry, scheme=weight.scheme, shape=weight.shape)
        linear = QuantizedLinear(entry, bias)
        linear.wanted = module.wanted
        for name, part in weight.parts.items():
            setattr(linear, name, part)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()
