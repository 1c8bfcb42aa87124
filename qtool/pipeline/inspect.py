"""What `qtool inspect` says beside what headers hold."""

from dataclasses import replace

from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import ModelError
from qtool.modeling.cache_growth import cache_growth
from qtool.modeling.config import parse_config
from qtool.runtime.card_memory import ACTIVATIONS, CardMemory, card_memory
from qtool.runtime.decode.read_model import FAMILIES


def memory_of(reader: CheckpointReader) -> CardMemory | None:
    """Return what a checkpoint takes on a card; None: transformers doesn't know its family."""
    try:
        config = parse_config(reader.config, reader.directory)
    except ModelError:
        return None
    memory = card_memory(reader, config)
    if config.model_type in FAMILIES:  # the decode runner's cache, which has all heads as they are
        return memory
    kept = cache_growth(config, reader.directory)
    return replace(
        memory, cache_bytes_per_token=None if kept is None else kept * ACTIVATIONS.itemsize
    )
