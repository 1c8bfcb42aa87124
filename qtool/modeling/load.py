"""Load a model object with its tokenizer, quantized or not, through transformers."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qtool.checkpoint.manifest import QUANT_METHOD
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.shards import open_shards, read_json
from qtool.errors import ModelError, QtoolError
from qtool.modeling.device import default_device, default_dtype
from qtool.modeling.locate import locate

DTypeName = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    name: str
    """What to call it in results: public name, else the directory's own name."""
    directory: Path
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def load_model(
    model: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model for evaluation; weights of another dtype are cast.

    Args:
        model: Directory (quantized or not), hub id, `.gguf` file, or `demo:smollm2`.
        device: None: the first CUDA card, else the CPU.
        dtype: Of activations and unquantized weights; None: by device.

    Raises:
        ModelError: transformers can't load it.
        CheckpointError: files are missing or damaged.
    """
    location = locate(model)
    if not (location.directory / "config.json").is_file():
        raise ModelError(f"{location.directory} has no config.json: it isn't a finished model.")
    # Says what is wrong better than transformers does, which fills missing parts with noise.
    if _is_ours(read_json(location.directory / "config.json")):
        CheckpointReader(location.directory)
    else:
        open_shards(location.directory)
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    loaded, tokenizer = _from_pretrained(location.directory, dtype)
    name = location.public_name or location.directory.resolve().name
    return LoadedModel(name, location.directory, loaded.to(device).eval(), tokenizer, device, dtype)


def _is_ours(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def load_tokenizer(model: str) -> Any:  # noqa: ANN401
    """Return the tokenizer of a model."""
    import transformers

    directory = locate(model).directory
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types
        raise ModelError(f"{directory} has no usable tokenizer: {error}") from error


def _from_pretrained(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=False, local_files_only=True
        )
    except QtoolError:
        raise
    except Exception as error:  # transformers raises many unrelated types
        raise ModelError(f"transformers can't load {directory}: {error}") from error
    return model, load_tokenizer(str(directory))
