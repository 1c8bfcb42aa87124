"""A GGUF file as a float16 directory, dequantized one tensor after the other."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from qtool.base import Emit, Progress, ignore_events
from qtool.checkpoint.assemble import write_streamed
from qtool.checkpoint.writer import MAX_SHARD_BYTES
from qtool.errors import CheckpointError
from qtool.exchange._gguf_about import read_about, read_tokenizer
from qtool.exchange._gguf_file import GgufFile, open_gguf
from qtool.exchange._gguf_read import names_of, read_float

_LOG = logging.getLogger(__name__)


def save_streamed(path: Path, target: Path, emit: Emit = ignore_events) -> bool:
    """Write what `save_pretrained` of transformers would, in the memory of one tensor.

    Args:
        path: The file.
        target: An empty directory.
        emit: Is told of each tensor.

    Returns:
        False if it is a file that qtool doesn't read, such as one of another architecture; then
        nothing is written.

    Raises:
        OSError: it can't be written.
    """
    try:
        file = open_gguf(path)
        names, config = names_of(file), read_about(file)
        tokenizer = read_tokenizer(path)
    except CheckpointError as error:
        _LOG.info("transformers has to read this file: %s", error)
        return False
    _save_config(config, target)
    stored = {full: name for name, full in names.items()}
    what = f"converting {path.name} to float16, once"
    write_streamed(target, _weights(file, stored, what, emit), MAX_SHARD_BYTES)
    for name, content in tokenizer.items():
        (target / name).write_bytes(content)
    return True


def _save_config(config: dict[str, object], target: Path) -> None:
    import transformers  # slow import

    kind = config.pop("model_type")
    parsed = transformers.AutoConfig.for_model(kind, **config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.float16)
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)


def _weights(
    file: GgufFile, stored: dict[str, str], what: str, emit: Emit
) -> Iterator[tuple[str, torch.Tensor]]:
    for done, full in enumerate(sorted(stored)):
        emit(Progress(what, done, len(stored), full))
        yield full, read_float(file, stored[full]).half()
