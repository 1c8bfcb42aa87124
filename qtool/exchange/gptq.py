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
from qtool.exchange._affine import FLOATS, ForeignGrid, why_not_affine
from qtool.exchange._gptq_rules import Rule, rule_of
from qtool.exchange._gptq_writing import compare_gptq, fields, write_gptq
from qtool.exchange._reading import (
    ForeignDirectory,
    check_int,
    layers_named,
    open_foreign,
    order_of_groups,
    others,
)
from qtool.exchange._words import unpack_words, words_for
from qtool.wording import shown

FORMAT = "gptq"
GPTQ_BITS = (2, 3, 4, 8)
VERSIONS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 2}
"""How `checkpoint_format` calls the two layouts of zero points."""
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, None)
"""That GPTQModel decodes; None: one per row."""
ALIGNED = 32
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _refuses(entry: LayerEntry, place: LayerPlace) -> str | None:
    reason = why_not_affine(entry, place, ordered=True)
    if reason is not None:
        return reason
    if entry.scheme.num_bits not in GPTQ_BITS:
        return f"it has {entry.scheme.num_bits} bits, and 2, 3, 4 or 8 are meant"
    if entry.scheme.group_size not in GROUP_SIZES:
        sizes = ", ".join(str(size or "row") for size in GROUP_SIZES)
        return f"its groups have {entry.scheme.group_size} inputs, and {sizes} are meant"
    if entry.activation is not None:
        return "its inputs are quantized while it runs, which this format has no word for"
    if entry.shape.in_features % ALIGNED or entry.shape.out_features % ALIGNED:
        return f"its shape is {tuple(entry.shape)}, and multiples of {ALIGNED} are meant"
    return None


def _read(path: Path) -> ForeignModel:
    directory = open_foreign(path)
    default = _default_rule(directory)
    dynamic = directory.value("dynamic", dict, default={})
    names = layers_named(directory, GPTQ_PARTS[0])
    rules = {name: rule_of(dynamic, name, default, directory.where) for name in names}
    return ForeignModel(
        config=directory.config,
        layers={name: partial(_load, directory, name, rule) for name, rule in rules.items()},
        others=others(directory, names, GPTQ_PARTS),
    )


def _default_rule(directory: ForeignDirectory) -> Rule:
    """Return what holds for layers that no `dynamic` rule is about."""
    name = directory.value(
        "checkpoint_format", str, default=directory.section.get("format") or FORMAT
    )
    version = VERSIONS.get(name)
    if version is None:
        raise CheckpointError(
            f"{directory.where}: checkpoint_format is {shown(name)}; known are "
            f"{' and '.join(VERSIONS)}."
        )
    packed = directory.value("pack_dtype", str, default="int32")
    if packed != "int32":
        raise CheckpointError(f"{directory.where}: pack_dtype is {shown(packed)}; int32 is meant.")
    bits = check_int(directory.value("bits", int), GPTQ_BITS, "bits", directory.where)
    size = directory.value("group_size", int, default=-1)
    return Rule(num_bits=bits, group_size=size, version=version)


def _load(directory: ForeignDirectory, name: str, rule: Rule) -> QuantizedTensor:
    """Read a layer."""
    bits = check_int(rule.num_bits, GPTQ_BITS, f"bits of {shown(name)}", directory.where)
    rows, outputs = directory.matrix(f"{name}.qweight")
    inputs = _inputs(directory, name, rows * 32 // bits)
    group = rule.group_size if rule.group_size > 0 else inputs
    groups = -(-inputs // group)
    ints, columns = (torch.int32,), words_for(outputs, bits)
    qweight = directory.read(f"{name}.qweight", (rows, outputs), ints)
    qzeros = directory.read(f"{name}.qzeros", (groups, columns), ints)
    scales = directory.read(f"{name}.scales", (groups, outputs), FLOATS)
    codes = unpack_words(qweight.T.contiguous(), bits, inputs)
    order = _order(directory, name, group, inputs)
    grid = ForeignGrid(
        codes=codes if order is None else codes[:, order],
        scales=scales.T.contiguous(),
        zeros=fields(qzeros, bits, outputs, rule.version).T.contiguous(),
        num_bits=bits,
        group_size=rule.group_size if rule.group_size > 0 else None,
        order=order,
    )
    return grid.to_tensor(f"{directory.path}: {shown(name)}.scales")


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


def _order(directory: ForeignDirectory, name: str, group: int, inputs: int) -> Tensor | None:
    """Return inputs sorted by group, (in_features,) int64; None where they are as they come."""
    full = f"{name}.g_idx"
    if full not in directory.shards.specs:
        return None
    g_idx = directory.read(full, (inputs,), (torch.int32, torch.int64)).long()
    return order_of_groups(g_idx, group, f"{directory.path}: {shown(full)}")


EXCHANGE = Exchange(
    summary="GPTQ: affine codes of 2, 3, 4 or 8 bits, groups along in_features, in any order.",
    quant_method="gptq",
    read=_read,
    refuses=_refuses,
    write=write_gptq,
    compare=compare_gptq,
)
