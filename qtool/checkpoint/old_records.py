"""What old versions of AutoGPTQ and AutoAWQ left: models whose config.json says nothing of bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.shards import open_files
from qtool.errors import CheckpointError

OLD_RECORDS: Mapping[str, str] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where they said how they had quantized a model."""
PACKED_SUFFIX = ".qweight"
"""What both call the codes of a linear."""


def check_old_record(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that only a file of another program's own calls quantized.

    Such a file beside weights that aren't quantized says nothing.

    Args:
        directory: Of the model.
        config: Its config.json.

    Raises:
        CheckpointError: it is one; says how it is imported.
    """
    if config.get("quantization_config") not in (None, {}):
        return
    name = next((name for name in OLD_RECORDS if (directory / name).is_file()), None)
    if name is not None and _is_packed(directory):
        raise CheckpointError(
            f"{directory / name} says how another program quantized it, and config.json doesn't: "
            f'put it there as quantization_config, with "quant_method": "{OLD_RECORDS[name]}", '
            f"name the weights model.safetensors, and `qtool import {directory}` reads it."
        )


def _is_packed(directory: Path) -> bool:
    """Return whether any file of weights has codes; pickled ones, which nobody looks into, may."""
    files = sorted(directory.glob("*.safetensors"))
    try:
        names = [name for file in files for name in open_files([file]).specs]
    except CheckpointError:  # said better by who reads them
        return False
    return any(name.endswith(PACKED_SUFFIX) for name in names) or (
        not files and any(directory.glob("*.bin"))
    )
