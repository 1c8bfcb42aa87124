"""What another program has quantized, where a command takes any model: imported once, and kept."""

from dataclasses import replace

from qtool.base import Emit
from qtool.checkpoint.shards import open_shards
from qtool.errors import OutputError
from qtool.exchange import exchange_of
from qtool.modeling.config import read_config
from qtool.modeling.digest import model_digest
from qtool.modeling.load import foreign_method
from qtool.modeling.locate import Location
from qtool.pipeline.import_model import import_model
from qtool.settings import cache_dir
from qtool.storage.kept_folders import WHOLE_NAME, alone, is_whole, note_whole
from qtool.storage.whole_files import remove_entry
from qtool.wording import reason

IMPORTED = "imported"
"""Folder of the cache."""
IMPORTING_VERSION = 1
"""Of what is made of a model."""


def as_ours(model: Location, emit: Emit) -> Location:
    """Return a model as commands can run it.

    That is itself, unless another program has quantized a directory and an exchange reads it: then
    a checkpoint in the cache that means the same, made the first time, by one of several processes.
    What none reads stays as it is, for whoever loads it to say so.

    Raises:
        CheckpointError: an exchange reads it, and it is damaged.
        OutputError: the cache can't be written.
    """
    directory = model.directory
    if foreign_method(read_config(directory)) is None or exchange_of(directory) is None:
        return model
    open_shards(directory)  # a damaged one is refused, also where it was imported whole before
    folder = cache_dir() / IMPORTED / model_digest(directory)[:32]
    target = folder / directory.resolve().name
    listing = folder / WHOLE_NAME  # beside it: nothing may lie in a checkpoint that isn't its own
    try:
        if not is_whole(target, listing, IMPORTING_VERSION):
            with alone(folder.with_name(f"{folder.name}.lock")):
                if not is_whole(target, listing, IMPORTING_VERSION):  # another process was faster
                    remove_entry(target)
                    import_model(Location(directory), target, overwrite=True, emit=emit)
                    note_whole(target, listing, IMPORTING_VERSION)
    except OSError as error:
        raise OutputError(
            f"{directory} can't be kept imported in {folder}: {reason(error)}. Set QTOOL_CACHE to "
            "a folder that can be written."
        ) from error
    return replace(model, path=target, emit=emit)
