"""A GGUF file as a model of ours: names of transformers, rows in its order, blocks to the bit."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.errors import CheckpointError
from qtool.exchange._gguf_blocks import decode_blocks
from qtool.exchange._gguf_file import GGML_FLOATS, GgufFile, GgufTensor
from qtool.exchange._gguf_names import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    Architecture,
    Dimensions,
    tensors_of,
    to_halves,
)
from qtool.wording import list_names, quoted, shown

MATRIX = 2


def architecture_of(file: GgufFile) -> Architecture:
    """Return what is known of a file's architecture.

    Raises:
        CheckpointError: nothing is.
    """
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        raise CheckpointError(
            f"{file.path}: qtool reads GGUF files of {', '.join(ARCHITECTURES)}, and this one is "
            f"of {shown(file.architecture)}. Import the model from another format.",
            file=file.path,
        )
    return known


def dimensions_of(file: GgufFile) -> Dimensions:
    """Return the sizes that the metadata give.

    Raises:
        CheckpointError: one is missing or no positive number, or the embedding is missing.
    """
    heads, width = _size(file, "attention.head_count"), _size(file, "embedding_length")
    table = file.tensors.get(EMBEDDING)
    if table is None:
        raise CheckpointError(f"{file.path} has no {EMBEDDING}.", file=file.path)
    rotated = file.value("rope.dimension_count") if file.architecture == "llama" else None
    head = file.value("attention.key_length") or rotated or width // heads
    if not isinstance(head, int) or head < 1 or head % 2:
        raise CheckpointError(
            f"{file.path}: heads have size {quoted(head)}; an even number is meant.", file=file.path
        )
    return Dimensions(
        blocks=_size(file, "block_count"),
        vocabulary=table.shape[0],
        width=width,
        inner=_size(file, "feed_forward_length"),
        heads=heads,
        key_heads=_size(file, "attention.head_count_kv", heads),
        head=head,
    )


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.value(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(
            f"{file.path}: {file.architecture}.{key} is {quoted(value)}; a positive whole number "
            "is meant.",
            file=file.path,
        )
    return value


def names_of(file: GgufFile) -> Mapping[str, str]:
    """Return transformers' name by the file's name of every tensor, all of them checked.

    Raises:
        CheckpointError: one is missing, unknown, or of another shape than the metadata say.
    """
    architecture, sizes = architecture_of(file), dimensions_of(file)
    wanted = {each.gguf: each for each in tensors_of(architecture, sizes)}
    unknown = sorted(file.tensors.keys() - wanted.keys() - {ROPE_FACTORS})
    missing = [
        name for name, each in wanted.items() if each.is_required and name not in file.tensors
    ]
    if unknown or missing:
        which = f"has {list_names(unknown)}" if unknown else f"lacks {list_names(missing)}"
        raise CheckpointError(
            f"{file.path} {which}, and a model of {file.architecture} as transformers builds it "
            f"{'has no such tensor' if unknown else 'needs that'}. Import it from another format.",
            file=file.path,
        )
    for name in file.tensors.keys() & wanted.keys():
        found = file.tensors[name].shape
        if found != wanted[name].shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {found}, and the metadata say "
                f"{wanted[name].shape}. Download it again.",
                file=file.path,
            )
    return {name: wanted[name].full for name in file.tensors if name in wanted}


def is_quantized(tensor: GgufTensor) -> bool:
    """Return whether it is stored in blocks of codes."""
    return tensor.type.name not in GGML_FLOATS


def _heads(file: GgufFile, name: str) -> int | None:
    return dimensions_of(file).heads_of(name) if architecture_of(file).is_permuted else None


def read_layer(file: GgufFile, name: str) -> QuantizedTensor:
    """Return a quantized tensor, to the bit, its rows as transformers has them.

    Raises:
        CheckpointError: the file has become shorter, or a scale isn't finite.
    """
    tensor, rows, heads = file.tensors[name], file.rows(name), _heads(file, name)
    if heads:
        rows = rows[to_halves(len(rows), heads)]
    try:
        return decode_blocks(rows, tensor.type)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file.path}: {name}: {error}. Download it again.", file=file.path
        ) from error


def read_plain(file: GgufFile, name: str) -> Tensor:
    """Return a tensor that isn't quantized, in its dtype, its rows as transformers has them."""
    tensor, heads = file.plain(name), _heads(file, name)
    return tensor[to_halves(len(tensor), heads)] if heads else tensor


def readers(
    file: GgufFile, names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return what reads quantized layers, what reads other tensors, and whose parts a head uses.

    Raises:
        CheckpointError: something else than a matrix is quantized.
    """
    layers, others = {}, {}
    for name, full in names.items():
        tensor = file.tensors[name]
        if not is_quantized(tensor):
            others[full] = partial(read_plain, file, name)
        elif len(tensor.shape) == MATRIX and name.endswith(".weight"):
            layers[full.removesuffix(".weight")] = partial(read_layer, file, name)
        else:
            raise CheckpointError(
                f"{file.path}: {name}, of shape {tensor.shape}, is of type {tensor.type.name}; "
                "only matrices are quantized.",
                file=file.path,
            )
    tied = HEAD not in names and is_quantized(file.tensors[EMBEDDING])
    head, embedding = (_layer(full) for full in ("lm_head.weight", names[EMBEDDING]))
    return layers, others, {head: embedding} if tied else {}


def _layer(full: str) -> str:
    return full.removesuffix(".weight")


def read_float(file: GgufFile, name: str) -> Tensor:
    """Return any tensor as float32, dequantized, its rows as transformers has them."""
    from qtool.checkpoint.manifest import codec

    if not is_quantized(file.tensors[name]):
        return read_plain(file, name).float()
    tensor = read_layer(file, name)
    return codec(tensor.format).dequantize(tensor, torch.float32)
