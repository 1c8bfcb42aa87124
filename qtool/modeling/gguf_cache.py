"""GGUF files, dequantized once to float16 directories in the cache.

A conversion takes minutes and what it makes is used for years, so it is whole or not there: files
are synced, a list of them with their digest is written last, and the directory gets its name only
then. Whoever finds it compares the digest, which `storage.digests` remembers.
"""

import logging
import shutil
from pathlib import Path

from qtool.base import Emit, Progress, ignore_events
from qtool.errors import ModelError, require
from qtool.settings import cache_dir
from qtool.storage.digests import files_digest
from qtool.storage.kept_folders import WHOLE_NAME, alone, is_whole, note_whole
from qtool.storage.whole_files import sync
from qtool.wording import reason

CONVERSION = 3
"""Of what is made of a file; 1 took transformers' word for how texts are cut into tokens, 2 for
special tokens."""
_LOG = logging.getLogger(__name__)


def convert_gguf(path: Path, emit: Emit = ignore_events) -> Path:
    """Dequantize a GGUF file to a float16 directory in the cache, unless it is there already.

    Of several processes one converts and the others wait. `emit` is told of each tensor.

    Raises:
        ModelError: the file can't be read, or the directory can't be written.
        MissingExtraError: the library that reads GGUF isn't installed.
    """
    try:
        target = cache_dir() / "gguf" / files_digest([path])[:32]
    except OSError as error:
        raise ModelError(f"{path} can't be read: {reason(error)}.") from error
    listing = target / WHOLE_NAME
    if is_whole(target, listing, CONVERSION):
        return target
    require(f"Reading {path.name}", "demo", "gguf")
    emit(Progress(f"converting {path.name} to float16, once"))
    partial = target.with_name(f"{target.name}.partial")
    try:
        with alone(target.with_name(f"{target.name}.lock")):
            if not is_whole(target, listing, CONVERSION):  # else another process was faster
                _convert(path, partial, target, emit)
                emit(Progress(f"opening {path.name}"))
    except OSError as error:
        raise ModelError(
            f"{path} can't be kept dequantized in {target.parent}: {reason(error)}. Set "
            "QTOOL_CACHE to a folder that can be written, with space for two bytes per weight."
        ) from error
    return target


def _convert(path: Path, partial: Path, target: Path, emit: Emit) -> None:
    """Make `target` anew, by way of `partial`; nobody else does at the same time."""
    if target.exists():
        _LOG.warning(
            "%s is damaged, incomplete or of an earlier version, and is made anew.", target
        )
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        _save_dequantized(path, partial, emit)
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        note_whole(partial, partial / WHOLE_NAME, CONVERSION)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_dequantized(path: Path, target: Path, emit: Emit) -> None:
    from qtool.modeling.gguf_streamed import save_streamed  # slow import

    if not save_streamed(path, target, emit):
        _save_whole(path, target)


def _save_whole(path: Path, target: Path) -> None:
    """Let transformers dequantize what qtool doesn't read, all tensors at once."""
    import torch  # slow imports
    import transformers
    from transformers import modeling_gguf_pytorch_utils as reading

    from qtool.exchange._gguf_about import read_tokenizer
    from qtool.storage.tensor_failures import numbered_failures

    transformers.utils.logging.disable_progress_bar()
    reading.tqdm = lambda tensors, **_: tensors  # a bar that heeds no switch of transformers
    quantization = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float16, **quantization
        )
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        # A fresh model: the loaded one refuses to be saved, being marked as quantized.
        model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float16)
        model.load_state_dict(loaded.state_dict(), strict=True)
        tokenizer = read_tokenizer(path)
    except Exception as error:  # transformers and gguf raise many unrelated types
        raise ModelError(
            f"{path}: transformers can't read this GGUF file: {reason(error)}"
        ) from error
    with numbered_failures():
        model.save_pretrained(target)
        for name, content in tokenizer.items():
            (target / name).write_bytes(content)
