"""A directory of safetensors files, read tensor by tensor.

Every file is opened once to check its header against its size and the index; a tensor's bytes are
read when they are asked for, and the file is closed again so that its pages can leave memory.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a stored tensor is and what shape it has."""

    file: Path
    dtype: str
    """safetensors' name: F16, BF16, F32, I32, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shards:
    """All tensors of a directory by name."""

    specs: Mapping[str, TensorSpec]

    def read(self, name: str) -> Tensor:
        """Return one tensor, copied out of its file.

        Raises:
            CheckpointError: the file has become unreadable.
        """
        spec = self.specs[name]
        try:
            with safe_open(spec.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{spec.file}: can't read {name}: {error}") from error
        return tensor


def open_shards(directory: Path) -> Shards:
    """Check and index the safetensors files of a directory.

    Raises:
        CheckpointError: files are missing, truncated, or disagree with the index.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        return Shards(_from_index(directory, index))
    single = directory / SINGLE_NAME
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return Shards(_read_header(files[0]))
    if files:
        raise CheckpointError(
            f"{directory} has {len(files)} safetensors files but no {INDEX_NAME}. "
            "Copy the index too."
        )
    if any(directory.glob("*.bin")):
        raise CheckpointError(
            f"{directory} holds pickled weights (.bin) only; qtool reads safetensors. Load it once "
            "with transformers and save_pretrained() it."
        )
    raise CheckpointError(f"{directory} holds no safetensors file.")


def open_files(paths: Iterable[Path]) -> Shards:
    """Check and index files that somebody else has chosen.

    Raises:
        CheckpointError: one is missing or truncated.
    """
    return Shards({name: spec for path in paths for name, spec in _read_header(path).items()})


def _from_index(directory: Path, index: Path) -> dict[str, TensorSpec]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.")
    headers: dict[str, dict[str, TensorSpec]] = {}
    specs = {}
    for name, file_name in weight_map.items():
        if Path(str(file_name)).name != file_name:
            raise CheckpointError(
                f"{index}: {name} is said to be in {file_name!r}, no plain file name."
            )
        if file_name not in headers:
            headers[file_name] = _read_header(directory / file_name)
        if name not in headers[file_name]:
            raise CheckpointError(
                f"{index} says that {name} is in {file_name}, but it isn't. "
                "Index and files don't belong together; download both again."
            )
        specs[name] = headers[file_name][name]
    return specs


def _read_header(path: Path) -> dict[str, TensorSpec]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Download it again.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorSpec(path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}). Download it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} isn't valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value
