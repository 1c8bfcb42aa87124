"""What `qtool inspect` says beside what headers hold."""

from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import ModelError
from qtool.modeling.config import parse_config
from qtool.runtime.card_memory import CardMemory, card_memory


def memory_of(reader: CheckpointReader) -> CardMemory | None:
    """Return what a checkpoint takes on a card; None: transformers doesn't know its family."""
    try:
        config = parse_config(reader.config, reader.directory)
    except ModelError:
        return None
    return card_memory(reader, config)
