"""Weights whose rows have bits of their own, as a run makes them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.formats.mixed_rows import encode_mixed
from qtool.scheme import WeightScheme
from qtool.steps.plan import load_method
from tests.helpers import problem


def solved_mixed(
    weight: Tensor, row_bits: Sequence[int], group_size: int | None, *, symmetric: bool = False
) -> QuantizedTensor:
    """Solve each class of rows by itself, without data, and join them."""
    method, bits, classes = load_method("bcq"), torch.tensor(row_bits, dtype=torch.uint8), []
    options = method.options(rounds=1, scales="coded")
    for num_bits in sorted(set(row_bits), reverse=True):
        scheme = WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
        classes.append(method.solve(problem(weight[bits == num_bits], scheme), options).tensor)
    return encode_mixed(classes, bits)


def mixed_checkpoint(source: Path, out_dir: Path, row_bits: Sequence[int], group_size: int) -> Path:
    """Copy a checkpoint whose tables are plain, and quantize these by rows.

    A head that the configuration ties to the embedding shares it.
    """
    shutil.copytree(source, out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    tensors = load_file(out_dir / "model.safetensors")
    entries = config["quantization_config"]["layers"]
    names = ["model.embed_tokens", "lm_head"]
    for name in names[: 1 if config["tie_word_embeddings"] else 2]:
        tensor = solved_mixed(tensors.pop(f"{name}.weight").float(), row_bits, group_size)
        tensors |= {f"{name}.{part}": values for part, values in tensor.parts.items()}
        config["quantization_config"]["unquantized"].pop(f"{name}.weight")
        entries[name] = {
            "format": tensor.format,
            "codec_version": 1,
            "method": "bcq",
            "shape": list(tensor.shape),
            "scheme": tensor.scheme.to_json(),
        }
    if config["tie_word_embeddings"]:
        entries[names[1]] = {**entries[names[0]], "shared_with": names[0]}
    config["quantization_config"].pop("digests", None)
    (out_dir / "config.json").write_text(json.dumps(config))
    save_file(tensors, out_dir / "model.safetensors", {"format": "pt"})
    return out_dir
