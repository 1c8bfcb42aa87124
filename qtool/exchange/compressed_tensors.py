"""compressed-tensors, as llm-compressor writes it and vLLM reads it: integer weights.

Tensors of a linear that is packed: `weight_packed` (out_features, in_features bits / 32) and, if
it has zero points, `weight_zero_point` (out_features bits / 32, groups), in words of codes;
`weight_scale` (out_features, groups); `weight_shape` (2,). Otherwise `weight` and
`weight_zero_point` are int8, codes less half their range. Source: compressed-tensors 0.20,
`compressors/pack_quantized` and `naive_quantized`.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import CheckpointError
from qtool.exchange import Exchange, ForeignModel, LayerPlace
from qtool.exchange._affine import FLOATS, ForeignGrid, why_not_affine
from qtool.exchange._ct_config import BY_TENSOR, CtGroup, group_of, read_groups
from qtool.exchange._ct_writing import compare_ct, is_usual, refuses_ct, write_ct
from qtool.exchange._reading import (
    ForeignDirectory,
    layers_named,
    open_foreign,
    order_of_groups,
    others,
)
from qtool.exchange._words import unpack_words, words_for
from qtool.wording import shown

PACKED_PART, WHOLE_PART, SCALE, ZERO = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
)
CT_PARTS = (PACKED_PART, SCALE, ZERO, "weight_shape", "weight_g_idx")
INTS, BYTES = (torch.int32,), (torch.int8,)
CT_BITS = range(2, 9)


def _refuses(entry: LayerEntry, place: LayerPlace) -> str | None:
    reason = why_not_affine(entry, place, ordered=False)
    if reason is not None:
        return reason
    scheme, size = entry.scheme, entry.scheme.group_size
    if scheme.num_bits not in CT_BITS:
        return f"it has {scheme.num_bits} bits, and 2 to 8 are meant"
    if size is not None and entry.shape.in_features % size:
        return f"groups of {size} don't divide its {entry.shape.in_features} inputs"
    if entry.activation is not None and not is_usual(entry.activation):
        return "its inputs are quantized otherwise than in 8 bits by token, without clipping"
    return None


def _read(path: Path) -> ForeignModel:
    directory = open_foreign(path)
    groups = read_groups(directory)
    packed = layers_named(directory, PACKED_PART, optional=True)
    stored = directory.shards.specs
    whole = [
        name
        for name in layers_named(directory, SCALE, optional=True)
        if name not in packed and f"{name}.{WHOLE_PART}" in stored
    ]
    names = [*packed, *whole]
    if not names:
        raise CheckpointError(f"{path}: no tensor is called .weight_packed or .weight_scale.")
    found = {name: group_of(groups, name, directory.where) for name in names}
    for name, group in found.items():
        if group.packed != (name in packed):
            raise CheckpointError(
                f"{directory.where}: config_groups.{shown(group.key)} says that {shown(name)} is "
                f"{'' if group.packed else 'not '}packed, and it is stored otherwise."
            )
    bytes_of = {f"{name}.{WHOLE_PART}" for name in whole}
    plain = others(directory, names, CT_PARTS)
    return ForeignModel(
        config=directory.config,
        layers={name: partial(_load, directory, name, group) for name, group in found.items()},
        others={name: load for name, load in plain.items() if name not in bytes_of},
        activations={name: one.activation for name, one in found.items() if one.activation},
    )


def _load(directory: ForeignDirectory, name: str, group: CtGroup) -> QuantizedTensor:
    """Read a layer."""
    outputs, inputs = _shape(directory, name, group)
    size = group.group_size or inputs
    groups = -(-inputs // size)
    if group.packed:
        codes = _numbers(directory, f"{name}.{PACKED_PART}", outputs, inputs, group.num_bits)
    else:
        codes = _from_bytes(
            directory.read(f"{name}.{WHOLE_PART}", (outputs, inputs), BYTES), group.num_bits
        )
    order = _order(directory, name, size, inputs)
    grid = ForeignGrid(
        codes=codes if order is None else codes[:, order],
        scales=_scales(directory, name, group, (outputs, groups)),
        zeros=_zeros(directory, name, group, (outputs, groups)),
        num_bits=group.num_bits,
        group_size=group.group_size,
        order=order,
    )
    return grid.to_tensor(f"{directory.path}: {shown(name)}.{SCALE}")


def _shape(directory: ForeignDirectory, name: str, group: CtGroup) -> tuple[int, int]:
    if not group.packed:
        return directory.matrix(f"{name}.{WHOLE_PART}")
    full = f"{name}.weight_shape"
    found = directory.read(full, (2,), (torch.int64, torch.int32)).tolist()
    outputs = directory.matrix(f"{name}.{PACKED_PART}")[0]
    if found[0] != outputs or not 0 < found[1] < 2**31:
        raise CheckpointError(
            f"{directory.path}: {shown(full)} is {found}, and {outputs} rows are stored."
        )
    return outputs, found[1]


def _numbers(
    directory: ForeignDirectory, full: str, rows: int, length: int, num_bits: int
) -> Tensor:
    """Return packed codes, (rows, length) uint8.

    Versions before 0.18 began a new word rather than let a code of 3, 5, 6 or 7 bits run on.
    """
    per_word = 32 // num_bits
    dense, padded = words_for(length, num_bits), -(-length // per_word)
    if directory.shape(full) == (rows, padded) and padded != dense:
        words = directory.read(full, (rows, padded), INTS)
        shifts = torch.arange(per_word, dtype=torch.int32) * num_bits
        codes = (words.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
        return codes.flatten(1)[:, :length].to(torch.uint8)
    return unpack_words(directory.read(full, (rows, dense), INTS), num_bits, length)


def _from_bytes(values: Tensor, num_bits: int) -> Tensor:
    """Return codes of signed numbers; of other than `num_bits` they would be others."""
    codes = values.to(torch.int16) + 2 ** (num_bits - 1)
    return codes.clamp(0, 2**num_bits - 1).to(torch.uint8)


def _scales(
    directory: ForeignDirectory, name: str, group: CtGroup, shape: tuple[int, int]
) -> Tensor:
    full = f"{name}.{SCALE}"
    if group.strategy != BY_TENSOR:
        return directory.read(full, shape, FLOATS)
    return directory.read(full, (1,), FLOATS).expand(shape).contiguous()


def _zeros(
    directory: ForeignDirectory, name: str, group: CtGroup, shape: tuple[int, int]
) -> Tensor:
    """Return zero points as codes, (outputs, groups) uint8."""
    full, bits = f"{name}.{ZERO}", group.num_bits
    if group.symmetric:
        return torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
    spec = directory.shards.specs.get(full)
    if spec is not None and spec.dtype == "I32":
        return _zeros_of_words(directory, full, bits, shape)
    if group.strategy == BY_TENSOR:
        return _from_bytes(directory.read(full, (1,), BYTES), bits).expand(shape).contiguous()
    return _from_bytes(directory.read(full, shape, BYTES), bits)


def _zeros_of_words(
    directory: ForeignDirectory, full: str, bits: int, shape: tuple[int, int]
) -> Tensor:
    """Return packed zero points: like codes, but along the outputs."""
    outputs, groups = shape
    per_word = 32 // bits
    dense, padded = words_for(outputs, bits), -(-outputs // per_word)
    rows = padded if directory.shape(full) == (padded, groups) and padded != dense else dense
    words = directory.read(full, (rows, groups), INTS).T.contiguous()
    if rows == dense:
        return unpack_words(words, bits, outputs).T.contiguous()
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :outputs].T.to(torch.uint8).contiguous()


def _order(directory: ForeignDirectory, name: str, size: int, inputs: int) -> Tensor | None:
    full = f"{name}.weight_g_idx"
    if full not in directory.shards.specs:
        return None
    g_idx = directory.read(full, (inputs,), (torch.int32, torch.int64)).long()
    if bool((g_idx == -1).all()):  # never set
        return None
    return order_of_groups(g_idx, size, f"{directory.path}: {shown(full)}")


EXCHANGE = Exchange(
    summary="compressed-tensors with integer weights: affine codes of 2 to 8 bits along "
    "in_features, packed, or with inputs of 8 bits.",
    quant_method="compressed-tensors",
    read=_read,
    refuses=_refuses,
    refuses_model=refuses_ct,
    write=write_ct,
    compare=compare_ct,
)
