"""Spooled layers -> safetensors files of bounded size, and their index."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from qtool.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from qtool.checkpoint.spool import Made, Spool
from qtool.checkpoint.stream import Piece, write_shard
from qtool.storage.plain_json import write_json_file

SPOOL = ".layers"


def write_streamed(
    directory: Path, layers: Iterable[tuple[str, Tensor | Mapping[str, Tensor]]], max_bytes: int
) -> None:
    """Write the weights of a directory in the memory of one layer.

    Args:
        directory: Is there.
        layers: Names, and a tensor of that name or tensors by full name; each is dropped before
            the next is made.
        max_bytes: Of a file.

    Raises:
        OSError: one can't be written.
    """
    spool = Spool(directory / SPOOL)
    spool.open()
    names = []
    for name, content in layers:
        spool.write(name, Made(content).tensors(name), {})
        names.append(name)
        del content
    assemble(spool, names, directory, max_bytes)
    shutil.rmtree(spool.directory)


def assemble(spool: Spool, names: list[str], directory: Path, max_bytes: int) -> list[str]:
    """Copy spooled tensors into shards of at most `max_bytes`; return the names of the files.

    Raises:
        OSError: one can't be written, or what is spooled has changed on disk.
    """
    shards = list(_fill_shards([spool.pieces(name) for name in names], max_bytes))
    digests = {key: digest for name in names for key, digest in spool.digests(name).items()}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_NAME
        if len(shards) > 1:
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file_name, shard, digests)
        weight_map.update({piece.name: file_name for piece in shard})
    if len(shards) == 1:
        return [SINGLE_NAME]
    total = sum(piece.num_bytes for shard in shards for piece in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_file(directory / INDEX_NAME, index)
    return [*dict.fromkeys(weight_map.values()), INDEX_NAME]


def _fill_shards(layers: list[list[Piece]], max_bytes: int) -> Iterator[list[Piece]]:
    """Yield shards of bounded size; the parts of one layer stay together."""
    shard: list[Piece] = []
    size = 0
    for layer in layers:
        layer_bytes = sum(piece.num_bytes for piece in layer)
        if shard and size + layer_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard += layer
        size += layer_bytes
    yield shard
