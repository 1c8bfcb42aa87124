"""A model source whose linears have their inputs divided by factors: the same function.

Weights are folded one by one as they are read. What is stored for good, a norm's weight, is rounded
to its dtype first, and the factor is what it was over what it has become: so nothing is lost. Where
biases are divided they are rounded as all that is stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qtool.errors import ModelError
from qtool.formats._dtypes import DTYPES
from qtool.modeling.foldable import FoldGroup
from qtool.modeling.source import ModelSource


@dataclass(frozen=True, slots=True)
class FoldedSource(ModelSource):
    """An unquantized model on disk, read as if factors were folded into it."""

    columns: Mapping[str, Tensor]
    """By linear, (in_features,) float64: what its inputs are divided by."""
    rows: Mapping[str, Tensor]
    """By linear, (out_features,) float64: what its outputs are divided by."""
    vectors: Mapping[str, Tensor]
    """By full name: weights of norms and biases, as they are stored from now on."""

    def read(self, name: str) -> Tensor:
        """Return a tensor by its full name, in the dtype that it is stored in."""
        values = self.read_exact(name)
        return values.to(DTYPES[self.spec(name).dtype])

    def read_exact(self, name: str) -> Tensor:
        """Return the same before it is rounded: folded matrices in float32 at least."""
        full = self._full(self.stored_name(name))
        if full in self.vectors:
            return self.vectors[full].clone()
        values, layer = ModelSource.read(self, name), full.removesuffix(".weight")
        columns, rows = self.columns.get(layer), self.rows.get(layer)
        if full == layer or (columns is None and rows is None):
            return values
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        matrix = values.T if self._is_transposed(layer) else values
        if columns is not None:
            matrix = matrix * columns.to(matrix)
        if rows is not None:
            matrix = matrix / rows.to(matrix).unsqueeze(1)
        return matrix.T.contiguous() if self._is_transposed(layer) else matrix

    def changed(self) -> tuple[str, ...]:
        """Return the full names of all tensors that aren't as they are stored."""
        matrices = {f"{layer}.weight" for layer in (*self.columns, *self.rows)}
        return tuple(sorted({*matrices, *self.vectors}))


def fold_source(
    source: ModelSource, groups: Iterable[FoldGroup], factors: Mapping[str, Tensor]
) -> FoldedSource:
    """Return the source with factors folded in.

    Args:
        source: The model, not folded yet.
        groups: What is folded, as `fold_groups` gives them.
        factors: By first linear of each group, (in_features,), what its inputs are divided by.

    Raises:
        ModelError: factors aren't finite and above zero, or of another number, or not alike where
            one output of the producer makes several inputs.
    """
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for group in groups:
        first = group.linears[0]
        wanted = factors[first].double().cpu()
        _check_factors(first, group, wanted)
        if group.is_norm:
            kept = _into_norm(source, group.producer, wanted, vectors)
        else:
            kept = wanted
            outputs = torch.ones(source.weight_shape(group.producer).out_features).double()
            rows[group.producer] = outputs.index_copy(0, group.channel, wanted)
            _divide(source, f"{group.producer}.bias", rows[group.producer], vectors)
        columns |= dict.fromkeys(group.linears, kept)
    values = {field.name: getattr(source, field.name) for field in fields(ModelSource)}
    return FoldedSource(**values, columns=columns, rows=rows, vectors=vectors)


def _check_factors(linear: str, group: FoldGroup, factors: Tensor) -> None:
    if factors.shape != group.channel.shape:
        raise ModelError(
            f"{linear}: {factors.numel()} factors were chosen for {len(group.channel)} inputs; one "
            "each is meant."
        )
    if not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise ModelError(f"{linear}: a factor isn't finite or isn't above zero. Use another fold.")
    shared = torch.ones(int(group.channel.max()) + 1).double().index_copy(0, group.channel, factors)
    if not torch.equal(shared[group.channel], factors):
        raise ModelError(
            f"{linear}: its inputs are made by fewer channels of {group.producer} (heads share "
            "them), and inputs of one channel have unlike factors. Use another fold."
        )


def _into_norm(
    source: ModelSource, norm: str, factors: Tensor, vectors: dict[str, Tensor]
) -> Tensor:
    """Divide a norm; return the factors that its rounded weight stands for, (width,) float64."""
    name, offset = f"{norm}.weight", source.adapter.norm_offset
    old = source.read(name)
    before = old.double() + offset
    new = (before / factors - offset).to(old.dtype)
    after = new.double() + offset
    lost = ~(torch.isfinite(after) & (after * before > 0))
    new = torch.where(lost, old, new)  # a weight of zero, or one that leaves its dtype
    kept = torch.where(lost, 1.0, before / after)
    vectors[name] = new
    _divide(source, f"{norm}.bias", kept, vectors)
    return kept


def _divide(source: ModelSource, name: str, factors: Tensor, vectors: dict[str, Tensor]) -> None:
    """Divide a bias, if there is one; it is rounded to its dtype."""
    if source.has(name):
        old = source.read(name)
        vectors[name] = (old.double() / factors).to(old.dtype)
