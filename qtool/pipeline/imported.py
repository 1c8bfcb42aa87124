"""What another program has quantized, where a command takes any model: imported once, and kept."""

import contextlib
from dataclasses import replace
from pathlib import Path

from qtool.base import Emit
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards
from qtool.errors import CheckpointError
from qtool.exchange import exchange_of
from qtool.modeling.config import read_config
from qtool.modeling.load import foreign_method
from qtool.modeling.locate import Location
from qtool.pipeline.import_model import import_model
from qtool.settings import cache_dir
from qtool.storage.digests import files_digest

IMPORTED = "imported"
"""Folder of the cache."""


def as_ours(model: Location, emit: Emit) -> Location:
    """Return a model as commands can run it.

    That is itself, unless another program has quantized a directory and an exchange reads it: then
    a checkpoint in the cache that means the same, made the first time. What none reads stays as it
    is, for whoever loads it to say so.

    Raises:
        CheckpointError: an exchange reads it, and it is damaged.
        OutputError: the cache can't be written.
    """
    directory = model.directory
    if foreign_method(read_config(directory)) is None or exchange_of(directory) is None:
        return model
    specs = open_shards(directory).specs.values()
    files = {spec.file for spec in specs} | {directory / "config.json"}
    name = directory.resolve().name
    target = cache_dir() / IMPORTED / files_digest(files)[:32] / name
    if not _is_checkpoint(target):
        import_model(Location(directory), target, overwrite=True, emit=emit)
    return replace(model, path=target, emit=emit)


def _is_checkpoint(directory: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        CheckpointReader(directory)
        return True
    return False
