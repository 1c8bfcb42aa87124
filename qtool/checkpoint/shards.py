"""A directory of safetensors files, read tensor by tensor.

Files are taken in the order in which transformers takes them, so that both always read the same
weights. Every file is opened once to check its header against its size and the index; a tensor's
bytes are read when they are asked for, and the file is closed again so that its pages can leave
memory. Headers are read without torch.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from qtool.errors import CheckpointError
from qtool.storage.plain_json import first_half
from qtool.wording import shown

if TYPE_CHECKING:
    from torch import Tensor

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

    def num_bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.stat().st_size for file in {spec.file for spec in self.specs.values()})

    def read(self, name: str) -> "Tensor":
        """Return one tensor, copied out of its file.

        Raises:
            CheckpointError: there is no such tensor, or the file has become unreadable.
        """
        return self._read(name, None)

    def read_entry(self, name: str, index: int) -> "Tensor":
        """Return one entry of a tensor's first dimension, without reading the others.

        Raises:
            CheckpointError: there is no such tensor, or the file has become unreadable.
        """
        return self._read(name, index)

    def _read(self, name: str, index: int | None) -> "Tensor":
        import torch  # slow

        if name not in self.specs:
            raise CheckpointError(f"{shown(name)} isn't stored.")
        spec = self.specs[name]
        try:
            with safe_open(spec.file, framework="pt") as file:
                read = file.get_tensor(name) if index is None else file.get_slice(name)[index]
                tensor: Tensor = read.clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{spec.file}: can't read {shown(name)}: {shown(str(error))}"
            ) from error
        return tensor


def open_shards(directory: Path) -> Shards:
    """Check and index the safetensors files of a directory; a single file comes before the index.

    Raises:
        CheckpointError: files are missing, truncated, or disagree with the index.
    """
    if (directory / SINGLE_NAME).is_file():
        return open_files([directory / SINGLE_NAME])
    if (directory / INDEX_NAME).is_file():
        return Shards(_from_index(directory / INDEX_NAME))
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{directory} has {len(others)} safetensors files but no {INDEX_NAME}, and none is "
            f"called {SINGLE_NAME}; these two are what transformers opens. Copy the index too, or "
            "rename the file."
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
        CheckpointError: one is missing or truncated, or two hold the same tensor.
    """
    return Shards(_joined(_read_header(path) for path in paths))


def _from_index(index: Path) -> dict[str, TensorSpec]:
    """Return all tensors of the files that the index names, as transformers reads them."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.")
    if not isinstance(content.get("metadata"), dict):
        raise CheckpointError(f"{index} has no metadata, which transformers needs; {{}} will do.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: {shown(name)} is said to be in {shown(repr(file_name))}, no plain file "
                "name."
            )
    headers = {file: _read_header(index.parent / file) for file in sorted(set(weight_map.values()))}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise CheckpointError(
                f"{index} says that {shown(name)} is in {shown(file_name)}, but it isn't. "
                "Index and files don't belong together; download both again."
            )
    return _joined(headers.values())


def _joined(headers: Iterable[Mapping[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """Return the tensors of several files; which of two counts, nobody can say."""
    specs: dict[str, TensorSpec] = {}
    for header in headers:
        for name, spec in header.items():
            if name in specs:
                raise CheckpointError(
                    f"{shown(name)} is stored both in {specs[name].file} and in {spec.file.name}. "
                    "The files don't belong together; download them again."
                )
            specs[name] = spec
    return specs


def _read_header(path: Path) -> dict[str, TensorSpec]:
    """Return the tensors of one file; safetensors checks names, offsets and size."""
    if not os.path.isfile(path):  # noqa: PTH113 - says no to what can't be a path
        raise CheckpointError(f"{path.parent / shown(path.name)} is missing. Download it again.")
    try:
        with safe_open(path, framework="np") as file:  # "pt" would import torch
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorSpec(path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({shown(str(error))}). Download it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the file is missing, holds no JSON object, or what is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise CheckpointError(
                f"{path} starts with a byte order mark, which transformers can't read. Save it as "
                "UTF-8 without one.",
                file=path,
            )
        value = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.", file=path) from None
    except RecursionError:
        raise CheckpointError(
            f"{path} isn't usable JSON: it is nested too deeply.", file=path
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} isn't valid JSON: {error}.", file=path) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.", file=path)
    if "\\u" in text and (where := first_half(value)) is not None:
        raise CheckpointError(
            f"{path}: {shown(where)} holds half of a surrogate pair, which is in no text. Write "
            "the whole character, or remove it.",
            file=path,
            key=where,
        )
    return value
