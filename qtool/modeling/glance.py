"""What config.json and the headers say of a model's layers, without torch and transformers."""

from pathlib import Path
from typing import NamedTuple

from qtool.base import ModelAdapter
from qtool.checkpoint.shards import open_shards
from qtool.modeling.config import check_original, read_config
from qtool.modeling.families import families, load_family


class Glance(NamedTuple):
    """A model of a known family, as its files tell of it."""

    adapter: ModelAdapter
    linears: tuple[str, ...]
    """Dotted names of all linears of the decoder blocks, in order of execution."""
    others: tuple[str, ...]
    """Dotted names of what else the blocks are made of."""


def glance(directory: Path) -> Glance | None:
    """Look at a model; None: its family, or a name in its files, needs transformers to tell.

    Raises:
        ModelError: it is no unquantized causal language model.
        CheckpointError: its files are missing or damaged.
    """
    config = read_config(directory)
    check_original(config, directory, families())
    stored = open_shards(directory).specs
    if config["model_type"] not in families():
        return None
    adapter = load_family(config["model_type"])
    start, base = adapter.blocks + ".", adapter.base_prefix + "."
    full = [name if name.startswith(base) else base + name for name in stored]
    inside = [name.removesuffix(".weight") for name in full if name.startswith(start)]
    numbers = {name.removeprefix(start).partition(".")[0] for name in inside}
    # Where it has another name only the class knows it; blocks beyond it match overrides as others.
    limit = config.get("num_hidden_layers", len(numbers))
    linears = tuple(
        f"{start}{block}.{name}"
        for block in range(len(numbers))
        for group in adapter.linears
        for name in group
        if not isinstance(limit, int) or block < limit
    )
    if not linears or not set(linears) <= set(inside):
        return None
    return Glance(adapter, linears, tuple(name for name in inside if name not in linears))
