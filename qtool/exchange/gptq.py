"""GPTQ, as AutoGPTQ began it and GPTQModel goes on: both layouts of zero points, any input order.

Tensors of a linear: `qweight` (in_features bits / 32, out_features), packed along the inputs;
`qzeros` (groups, out_features bits / 32), packed along the outputs; `scales` (groups,
out_features); `g_idx` (in_features,), the group of each input. Version 1 stores zero points less
one. Sources: GPTQModel 7.7, `nn_modules/qlinear` and `utils/model.py`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import CheckpointError
from qtool.exchange import Exchange, ForeignModel, LayerPlace
from qtool.exchange._affine import FLOATS, Grid, why_not_affine
from qtool.exchange._gptq_rules import Rule, rule_of
from qtool.exchange._gptq_writing import compare_gptq, fields, write_gptq
from qtool.exchange._reading import ForeignDirectory, check_int, open_foreign
from qtool.exchange._words import unpack_words, words_for
from qtool.wording import shown

BITS = (2, 3, 4, 8)
VERSIONS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 2}
"""How `checkpoint_format` calls the two layouts of zero points."""
ALIGNED = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _refuses(entry: LayerEntry, place: LayerPlace) -> str | None:
    reason = why_not_affine(entry, place, ordered=True)
    if reason is not None:
        return reason
    if entry.scheme.num_bits not in BITS:
        return f"it has {entry.scheme.num_bits} bits, and 2, 3, 4 or 8 are meant"
    if entry.activation is not None:
        return "its inputs are quantized while it runs, which this format has no word for"
    if entry.shape.in_features % ALIGNED or entry.shape.out_features % ALIGNED:
        return f"its shape is {tuple(entry.shape)}, and multiples of {ALIGNED} are meant"
    return None


def _read(path: Path) -> ForeignModel:
    directory = open_foreign(path)
    default = _default_rule(directory)
    dynamic = directory.value("dynamic", dict, default={})
    ends = tuple(f".{part}" for part in PARTS)
    stored = directory.shards.specs
    names = [name.removesuffix(ends[0]) for name in stored if name.endswith(ends[0])]
    if not names:
        raise CheckpointError(f"{path}: no tensor is called .qweight: nothing is quantized there.")
    layers = {}
    for name in names:
        rule = rule_of(dynamic, name, default, directory.where)
        layers[name] = partial(_load, directory, name, rule)
    owned = {f"{name}{end}" for name in names for end in ends}
    others = {name: partial(directory.shards.read, name) for name in stored if name not in owned}
    return ForeignModel(config=directory.config, layers=layers, others=others)


def _default_rule(directory: ForeignDirectory) -> Rule:
    """Return what holds for layers that no `dynamic` rule is about."""
    name = directory.value("checkpoint_format", str, default=directory.section.get("format"))
    version = VERSIONS.get(name or "gptq")
    if version is None:
        raise CheckpointError(
            f"{directory.where}: checkpoint_format is {shown(name)}; known are "
            f"{' and '.join(VERSIONS)}."
        )
    packed = directory.value("pack_dtype", str, default="int32")
    if packed != "int32":
        raise CheckpointError(f"{directory.where}: pack_dtype is {shown(packed)}; int32 is meant.")
    bits = check_int(directory.value("bits", int), BITS, "bits", directory.where)
    size = directory.value("group_size", int, default=-1)
    return Rule(num_bits=bits, group_size=size, version=version)


def _load(directory: ForeignDirectory, name: str, rule: Rule) -> QuantizedTensor:
    """Read a layer."""
    bits = check_int(rule.num_bits, BITS, f"bits of {shown(name)}", directory.where)
    size = directory.shape(f"{name}.qweight")
    if len(size) != 2 or not min(size) or size[0] * 32 % bits:  # noqa: PLR2004 - a matrix
        raise CheckpointError(
            f"{directory.path}: {shown(name)}.qweight has shape {size}, which is no matrix of "
            f"{bits} bits."
        )
    rows, outputs = size[0], size[1]
    inputs = _inputs(directory, name, rows * 32 // bits)
    group = rule.group_size if rule.group_size > 0 else inputs
    groups = -(-inputs // group)
    ints, columns = (torch.int32,), words_for(outputs, bits)
    qweight = directory.read(f"{name}.qweight", (rows, outputs), ints)
    qzeros = directory.read(f"{name}.qzeros", (groups, columns), ints)
    scales = directory.read(f"{name}.scales", (groups, outputs), FLOATS)
    codes = unpack_words(qweight.T.contiguous(), bits, inputs)
    order = _order(directory, name, group, groups, inputs)
    grid = Grid(
        codes=codes if order is None else codes[:, order],
        scales=scales.T.contiguous(),
        zeros=fields(qzeros, bits, outputs, rule.version).T.contiguous(),
        num_bits=bits,
        group_size=rule.group_size if rule.group_size > 0 else None,
        order=order,
    )
    return grid.to_tensor(f"{name}.scales")


def _inputs(directory: ForeignDirectory, name: str, packed: int) -> int:
    """Return how many inputs a layer has: all that are packed, or as many as have a group."""
    spec = directory.shards.specs.get(f"{name}.g_idx")
    if spec is None:
        return packed
    if len(spec.shape) != 1 or not packed - ALIGNED < spec.shape[0] <= packed:
        raise CheckpointError(
            f"{spec.file}: {shown(name)}.g_idx has shape {spec.shape}; a number for each of "
            f"{packed} inputs is meant."
        )
    return spec.shape[0]


def _order(
    directory: ForeignDirectory, name: str, group: int, groups: int, inputs: int
) -> Tensor | None:
    """Return inputs sorted by group, (in_features,) int64; None where they are as they come."""
    full = f"{name}.g_idx"
    if full not in directory.shards.specs:
        return None
    g_idx = directory.read(full, (inputs,), (torch.int32, torch.int64)).long()
    usual = torch.arange(inputs) // group
    if torch.equal(g_idx, usual):
        return None
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CheckpointError(
            f"{directory.path}: {shown(full)} holds groups {int(g_idx.min())} to "
            f"{int(g_idx.max())}; 0 to {groups - 1} are meant."
        )
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order], usual):
        raise CheckpointError(
            f"{directory.path}: {shown(full)} gives groups other than {group} inputs each, which "
            "no format of qtool holds."
        )
    return order


EXCHANGE = Exchange(
    summary="GPTQ: affine codes of 2, 3, 4 or 8 bits, groups along in_features, in any order.",
    quant_method="gptq",
    read=_read,
    refuses=_refuses,
    write=write_gptq,
    compare=compare_gptq,
)
