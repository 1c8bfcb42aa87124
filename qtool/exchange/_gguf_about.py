"""Configuration and tokenizer of a GGUF file, as transformers reads them out of its metadata."""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.errors import CheckpointError, require
from qtool.exchange._gguf_file import GgufFile, read_gguf_metadata
from qtool.exchange._gguf_names import HEAD, ROPE_FACTORS
from qtool.exchange._gguf_read import dimensions_of
from qtool.exchange._gguf_tokenizer import as_metadata_say
from qtool.wording import reason, shown

LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all models with such positions that are known; a file has only what comes of them."""


def read_about(file: GgufFile) -> dict[str, Any]:
    """Return config.json of a file's model, as if it weren't quantized.

    Raises:
        CheckpointError: transformers can't read the metadata, or positions are scaled in a way
            that they don't tell.
        MissingExtraError: the library that reads GGUF isn't installed.
    """
    import transformers

    with _reading(file.path):
        found = transformers.AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        found.architectures = [mapping[type(found)].__name__]
        config: dict[str, Any] = json.loads(found.to_json_string(use_diff=True))
    for key in ("_name_or_path", "quantization_config", "torch_dtype"):
        config.pop(key, None)
    sizes, names = dimensions_of(file), file.tensors.keys()
    config |= {
        "dtype": "float16",
        "head_dim": sizes.head,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": HEAD not in names,
    }
    if file.architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if file.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    return config | _positions(file, config)


def _positions(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of scaled positions, which transformers doesn't take over."""
    kind = file.value("rope.scaling.type", "none")
    if kind != "none":
        raise CheckpointError(
            f"{file.path}: its positions are scaled ({shown(kind)}), which qtool doesn't take over "
            "from a GGUF file. Import the model from another format.",
            file=file.path,
        )
    if ROPE_FACTORS not in file.tensors:
        return {}
    factors, base = file.plain(ROPE_FACTORS).float(), float(file.value("rope.freq_base", 10000.0))
    if bool((factors == 1).all()):
        return {}
    for factor in LLAMA3_FACTORS:
        scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
        wanted = llama3_factors(2 * len(factors), base, scaling)
        if torch.allclose(factors, wanted, rtol=1e-4):
            return _scaled(config, scaling, base)
    raise CheckpointError(
        f"{file.path}: {ROPE_FACTORS} isn't what Llama 3.1 or 3.2 have, and nothing else tells how "
        "positions are scaled. Import the model from another format.",
        file=file.path,
    )


def _scaled(config: Mapping[str, Any], scaling: dict[str, Any], base: float) -> dict[str, Any]:
    if "rope_parameters" in config:  # transformers 5
        return {"rope_parameters": {**scaling, "rope_theta": base}}
    return {"rope_scaling": scaling, "rope_theta": base}


def llama3_factors(head: int, base: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Return by what each frequency of Llama 3's scaled positions is divided, (head / 2,) float32.

    As `_compute_llama3_parameters` of transformers, and llama.cpp's converter.
    """
    factor, low, high = (
        float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    length = float(scaling["original_max_position_embeddings"])
    found = []
    for even in range(0, head, 2):
        wavelength = 2 * math.pi * base ** (even / head)
        smooth = (length / wavelength - low) / (high - low)
        found.append(1 / ((1 - min(max(smooth, 0), 1)) / factor + min(max(smooth, 0), 1)))
    return torch.tensor(found, dtype=torch.float32)


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """Return the files of a file's tokenizer by their names, as transformers saves them.

    Special tokens are the file's, and a text is cut as llama.cpp does, where that is known.

    Raises:
        CheckpointError: transformers can't read it.
        MissingExtraError: the library that reads GGUF isn't installed.
    """
    import transformers

    with _reading(path), tempfile.TemporaryDirectory() as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
        files = {each.name: each.read_bytes() for each in sorted(Path(folder).iterdir())}
        return as_metadata_say(files, read_gguf_metadata(path))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever transformers and gguf raise into one sentence."""
    require(f"Reading {path.name}", "demo", "gguf")
    try:
        yield
    except Exception as error:  # they raise many unrelated types
        raise CheckpointError(
            f"{path}: transformers can't read this GGUF file: {reason(error)}", file=path
        ) from error
