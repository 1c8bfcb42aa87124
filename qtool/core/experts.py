"""Experts of a mixture, one linear each, where transformers fuses them in tensors of 3 dimensions.

So each expert is a layer as any other: it is named, quantized, hooked and replaced by itself. The
name of expert 7 of `mlp.experts.down_proj` is `mlp.experts.down_proj[7]`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

FIRST, ALONE, LAST = "gate_up_proj", "up_proj", "down_proj"
"""What transformers calls the weights: gate and up joined, up without a gate, down."""
_MARKS = re.compile("router|shared")
"""In the names of what stands beside experts right in a block."""
_NAME = re.compile(r"(?:(?P<module>.+)\.)?(?P<weight>[^.\[\]]+)\[(?P<index>\d+)\]")


class ExpertName(NamedTuple):
    """What the dotted name of an expert's layer says."""

    module: str
    """Dotted name of the module that holds the experts."""
    weight: str
    """Of its weights, such as `down_proj`."""
    number: int
    """Of the expert."""

    @property
    def fused(self) -> str:
        """Return the dotted name of the tensor that holds the layers of all experts."""
        return f"{self.module}.{self.weight}" if self.module else self.weight

    def __str__(self) -> str:
        return f"{self.fused}[{self.number}]"


def expert_name(layer: str) -> ExpertName | None:
    """Read the dotted name of a layer; None: it isn't that of one expert."""
    found = _NAME.fullmatch(layer)
    if found is None:
        return None
    return ExpertName(found["module"] or "", found["weight"], int(found["index"]))


class SeparateExperts(nn.Module):
    """Stands in for the fused experts of transformers 5, whose weights it has as linears.

    It has the attributes, biases and other parts of what it replaces, under their names. Weights
    are views of the fused ones until they are replaced: nothing is copied.
    """

    first: str
    last: str
    num_experts: int
    has_gate: bool
    act_fn: nn.Module

    def __init__(self, fused: nn.Module) -> None:
        """Take the experts apart; those of `is_fused`."""
        super().__init__()
        own = {"training", "forward", *vars(self)}
        for key, value in vars(fused).items():
            if key not in own:
                setattr(self, key, value)
        self.kind = type(fused)
        """Whose gate it uses."""
        self.first, self.last = _weights_of(fused)
        self.num_experts = len(fused.get_parameter(self.last))
        self._parameters.update(fused._parameters)
        self._modules.update(fused._modules)
        for name in (self.first, self.last):
            weights = self._parameters.pop(name)
            assert weights is not None
            turned = weights.detach().transpose(1, 2) if _is_transposed(fused) else weights.detach()
            for index, weight in enumerate(turned):
                self.add_module(f"{name}[{index}]", _linear(weight))

    def linear(self, name: str, index: int) -> nn.Module:
        """Return what multiplies by one weight of one expert."""
        module = self._modules[f"{name}[{index}]"]
        assert module is not None
        return module

    def inner(self, index: int, x: Tensor) -> Tensor:
        """Return what goes into the last linear of an expert: (n, hidden) -> (n, intermediate)."""
        y = self._multiply(self.first, index, x)
        return self._gated(y)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Return what an expert makes of tokens, not yet weighed: (n, hidden) -> (n, hidden)."""
        y = self._multiply(self.last, index, self.inner(index, x))
        norm = getattr(self, "post_expert_norm", None)
        return y if norm is None else norm(y)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the sum over the experts of each token, weighed.

        Sums as transformers' default does: what the experts of a token say is added at once.

        Args:
            hidden: (tokens, hidden).
            index: (tokens, k) int64, experts of each token; the number of experts means none.
            weights: (tokens, k), theirs.
        """
        dtype = torch.promote_types(hidden.dtype, weights.dtype)
        said = hidden.new_zeros(index.numel(), hidden.shape[-1], dtype=dtype)
        for number, slots in chosen(index, self.num_experts):
            y = self.expert(number, hidden[slots // index.shape[-1]])
            said[slots] = (y * weights.flatten()[slots].unsqueeze(-1)).to(dtype)
        return said.view(*index.shape, -1).sum(1).to(hidden.dtype)

    def seen(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Return what it is called with as tokens and their experts, for statistics.

        Returns:
            (tokens, hidden), and (tokens, k) int64.
        """
        hidden, index = arguments[:2]
        return hidden.flatten(0, -2), index.reshape(-1, index.shape[-1])

    def paired(self, x: Tensor, index: Tensor, other: Tensor, others: Tensor) -> Tensor:
        """Return what the tokens of `x` are in another run of the same tokens.

        Args:
            x: What `seen` gave, (tokens, hidden).
            index: With it.
            other: What it gave in the other run.
            others: With that.
        """
        del x, index, others
        return other

    def _multiply(self, name: str, index: int, x: Tensor) -> Tensor:
        y: Tensor = self.linear(name, index)(x)
        bias = self._parameters.get(f"{name}_bias")
        return y if bias is None else y + bias[index].to(y.dtype)

    def _gated(self, y: Tensor) -> Tensor:
        if not self.has_gate:
            function: Tensor = self.act_fn(y)
            return function
        apply_gate: Callable[[nn.Module, Tensor], Tensor] = getattr(self.kind, "_apply_gate")  # noqa: B009
        return apply_gate(self, y)


class SeparateSlabs(SeparateExperts):
    """The same for Llama 4, which gives each expert all tokens, those of others as zeros.

    An expert makes zeros of zeros, so that only the others run.
    """

    has_gate = True

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Return what each expert makes of its tokens: like `hidden`, (experts * tokens, hidden).

        Args:
            hidden: For each expert all tokens, multiplied by their weights.
        """
        slabs = hidden.view(self.num_experts, -1, hidden.shape[-1])
        said = torch.zeros_like(slabs)
        for index, slab in enumerate(slabs):
            rows = slab.any(-1).nonzero().squeeze(-1)
            if len(rows):
                said[index, rows] = self.expert(index, slab[rows])
        return said.flatten(0, 1)

    def seen(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Return what its experts see, token by token, and of each the expert."""
        hidden = arguments[0]
        slabs = hidden.view(self.num_experts, -1, hidden.shape[-1])
        token, index = slabs.any(-1).T.nonzero(as_tuple=True)
        return slabs[index, token], index.unsqueeze(-1)

    def paired(self, x: Tensor, index: Tensor, other: Tensor, others: Tensor) -> Tensor:
        """Return the same tokens where the same experts have them; others as they are."""
        if others.shape != index.shape:
            return x
        return torch.where(index == others, other, x)

    def _gated(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        gated: Tensor = up * self.act_fn(gate)
        return gated


def chosen(index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has tokens, with where these stand in `index`, flattened.

    Args:
        index: (tokens, k) int64.
        num_experts: Numbers from this one on mean none.
    """
    order = index.flatten().argsort(stable=True)
    counts = torch.bincount(index.flatten(), minlength=num_experts)
    for number, slots in enumerate(order.split(counts.tolist())[:num_experts]):
        if len(slots):
            yield number, slots


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds experts that `SeparateExperts` can stand in for."""
    return _kind_of(module) is not None


def _kind_of(module: nn.Module) -> type[SeparateExperts] | None:
    names = _weights_of(module)
    parameters = [module._parameters.get(name) for name in names]
    if not names or any(p is None or p.dim() != 3 for p in parameters):  # noqa: PLR2004
        return None
    if hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate"):
        return SeparateExperts
    # A class without the mark of transformers' interface for experts: told by its name.
    return SeparateSlabs if type(module).__name__ == "Llama4TextExperts" else None


def _weights_of(module: nn.Module) -> tuple[str, ...]:
    names = (FIRST, LAST) if getattr(module, "has_gate", True) else (ALONE, LAST)
    return names if all(name in module._parameters for name in names) else ()


def _is_transposed(module: nn.Module) -> bool:
    """Return whether the weights are stored as (in_features, out_features)."""
    return bool(getattr(module, "is_transposed", _kind_of(module) is SeparateSlabs))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def fused_shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Return the experts' weights of a model: by dotted name shape and whether they are transposed.

    The shape is that of the tensor, of 3 dimensions, the first that of the experts.
    """
    found = {}
    for name, module in model.named_modules():
        if is_fused(module):
            for weight in _weights_of(module):
                shape = tuple(module.get_parameter(weight).shape)
                found[f"{name}.{weight}"] = shape, _is_transposed(module)
    return found


def separate_experts(model: nn.Module) -> Sequence[str]:
    """Replace all fused experts of a model in place; return the dotted names of the modules."""
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    for name in fused:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        kind = _kind_of(module)
        assert kind is not None
        setattr(model.get_submodule(parent), child, kind(module))
    return fused


def separated(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its experts apart, or the model itself if it fuses none."""
    if not any(is_fused(module) for module in model.modules()):
        return model
    copy = deepcopy(model)
    separate_experts(copy)
    return copy


def routes_tokens(model: nn.Module) -> bool:
    """Return whether there are experts inside: the host reads which run, so no graph holds it."""
    return any(isinstance(module, SeparateExperts) for module in model.modules())


def beside_experts(block: nn.Module) -> list[str]:
    """Return the linears of a block that stand beside experts: routers, gates, shared experts.

    Every token passes them, so that few weights decide much.
    """
    experts = [name for name, module in block.named_modules() if _holds_experts(name, module)]
    parents = {name.rpartition(".")[0] for name in experts}
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and not any(name.startswith(f"{inside}.") for inside in experts)
        and any(
            name.startswith(f"{parent}.") if parent else _MARKS.search(name) for parent in parents
        )
    ]


def _holds_experts(name: str, module: nn.Module) -> bool:
    in_list = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
    return in_list or isinstance(module, SeparateExperts)
