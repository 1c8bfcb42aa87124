"""AWQ, as AutoAWQ packs it for its GEMM kernels; only read.

Tensors of a linear: `qweight` (in_features, out_features / 8), `qzeros` (groups, out_features / 8),
both packed along the outputs with nibbles interleaved; `scales` (groups, out_features). Sources:
AutoAWQ, `modules/linear/gemm.py`; GPTQModel 7.7, `quantization/awq/utils/packing_utils.py`.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.errors import CheckpointError
from qtool.exchange import Exchange, ForeignModel
from qtool.exchange._affine import FLOATS, ForeignGrid
from qtool.exchange._reading import ForeignDirectory, check_int, layers_named, open_foreign, others
from qtool.exchange._words import unpack_words
from qtool.wording import shown

NUM_BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word each of its eight columns is in."""
AWQ_PARTS = ("qweight", "qzeros", "scales")
KIND = "gemm"


def _read(path: Path) -> ForeignModel:
    directory = open_foreign(path)
    # The second names are those of AutoAWQ's own quant_config.json.
    bits = directory.value("bits", int, default=directory.value("w_bit", int, default=NUM_BITS))
    check_int(bits, (NUM_BITS,), "bits", directory.where)
    name = directory.value("version", str, default=directory.section.get("format") or KIND)
    if name.lower() != KIND:
        raise CheckpointError(
            f"{directory.where}: version is {shown(name)}; {KIND} is the layout that is known."
        )
    usual = directory.value("q_group_size", int, default=128)
    group_size = directory.value("group_size", int, default=usual)
    names = layers_named(directory, AWQ_PARTS[0])
    return ForeignModel(
        config=directory.config,
        layers={layer: partial(_load, directory, layer, group_size) for layer in names},
        others=others(directory, names, AWQ_PARTS),
    )


def _load(directory: ForeignDirectory, name: str, group_size: int) -> QuantizedTensor:
    """Read a layer."""
    inputs, words = directory.matrix(f"{name}.qweight")
    outputs, group = words * PER_WORD, group_size if group_size > 0 else inputs
    groups, ints = -(-inputs // group), (torch.int32,)
    codes = directory.read(f"{name}.qweight", (inputs, words), ints)
    zeros = directory.read(f"{name}.qzeros", (groups, words), ints)
    scales = directory.read(f"{name}.scales", (groups, outputs), FLOATS)
    grid = ForeignGrid(
        codes=_columns(codes, outputs).T.contiguous(),
        scales=scales.T.contiguous(),
        zeros=_columns(zeros, outputs).T.contiguous(),
        num_bits=NUM_BITS,
        group_size=group_size if group_size > 0 else None,
    )
    return grid.to_tensor(f"{directory.path}: {shown(name)}.scales")


def _columns(words: Tensor, outputs: int) -> Tensor:
    """Undo the interleaving: (rows, outputs / 8) int32 -> (rows, outputs) uint8."""
    nibbles = unpack_words(words, NUM_BITS, outputs)
    return nibbles.unflatten(1, (-1, PER_WORD))[..., list(PLACES)].flatten(1)


EXCHANGE = Exchange(
    summary="AWQ in the layout of its GEMM kernels: affine codes of 4 bits; only read.",
    quant_method="awq",
    read=_read,
)
