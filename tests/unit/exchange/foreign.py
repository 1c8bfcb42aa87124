"""Directories of one foreign layer, as peers write them; no model is built to read these."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VECTORS = Path(__file__).with_name("vectors.safetensors")
LAYER = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}


def ct(bits: int, *, symmetric: bool, **changes: Any) -> dict[str, Any]:
    """Return `quantization_config` of compressed-tensors."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": 16,
        **changes,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def vectors(case: str) -> dict[str, Tensor]:
    """Return the tensors of a case by part, `decoded` among them."""
    with safe_open(VECTORS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118
        return {name.removeprefix(f"{case}."): file.get_tensor(name) for name in names}


def cases() -> list[str]:
    """Return the names of all cases."""
    with safe_open(VECTORS, framework="pt") as file:
        return sorted({name.partition(".")[0] for name in file.keys()})  # noqa: SIM118


def directory(path: Path, parts: Mapping[str, Tensor], section: object) -> Path:
    """Write a directory of one layer."""
    path.mkdir(exist_ok=True)
    tensors = {f"{LAYER}.{name}": part.contiguous() for name, part in parts.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": section}
    (path / "config.json").write_text(json.dumps(config))
    return path
