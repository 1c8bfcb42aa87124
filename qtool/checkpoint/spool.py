"""The layers that a run has finished, one file each, until they are copied into shards.

A file counts only if it is whole: its notes carry a digest of themselves and of every tensor. What
is damaged isn't finished, and is solved anew.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import tensor_digest
from qtool.checkpoint.stream import UNREADABLE, Piece, pieces_of, put_back
from qtool.storage.tensor_failures import numbered_failures
from qtool.storage.whole_files import sync

LONGEST_NAME = 200
"""In bytes; file systems take 255, with what is added."""
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Made:
    """One layer or one plain tensor, with what a resumed run wants to know of it.

    A draft may be several tensors by name.
    """

    value: QuantizedTensor | Tensor | Mapping[str, Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able; not in the checkpoint."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors by full name: the parts of a layer become `<name>.<part>`."""
        if isinstance(self.value, Tensor):
            return {name: self.value}
        if not isinstance(self.value, QuantizedTensor):
            return dict(self.value)
        return {f"{name}.{part}": tensor for part, tensor in self.value.parts.items()}


class Spool:
    """A folder of finished layers."""

    def __init__(self, directory: Path) -> None:
        """Use a folder, which need not exist yet."""
        self.directory = directory
        self._known: dict[str, dict[str, Any]] = {}

    def open(self) -> None:
        """Make the folder, take in what shards of an earlier run hold, drop what is half-written.

        Raises:
            OSError: it can't be written.
        """
        self.directory.mkdir(exist_ok=True)
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.suffix != SUFFIX:
                path.unlink()
        for shard in sorted(self.directory.parent.glob(f"*{SUFFIX}")):
            put_back(shard, sorted(self.directory.iterdir()))

    def __len__(self) -> int:
        return len(list(self.directory.glob(f"*{SUFFIX}")))

    def write(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write one layer so that it survives a loss of power.

        Args:
            name: Of the layer.
            tensors: By full name.
            notes: JSON-able; what `notes` returns.

        Raises:
            OSError: it can't be written.
        """
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        described = {key: _describe(tensor) for key, tensor in on_cpu.items()}
        text = json.dumps({"name": name, "notes": dict(notes), "tensors": described})
        path = self._path(name)
        temporary = path.with_suffix(".tmp")
        marked = {"notes": text, "digest": sha256(text.encode()).hexdigest()}
        with numbered_failures():
            save_file(on_cpu, temporary, marked)
        sync(temporary)
        temporary.replace(path)
        sync(self.directory)
        self._known[name] = json.loads(text)

    def notes(self, name: str) -> dict[str, Any] | None:
        """Return the notes of a layer if its file is whole, else None."""
        if name not in self._known:
            found = self._read(name)
            if found is None:
                return None
            self._known[name] = found
        return self._known[name]["notes"]

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                text = file.metadata()["notes"]
                described = {key: _describe(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
                whole = file.metadata()["digest"] == sha256(text.encode()).hexdigest()
            values: dict[str, Any] = json.loads(text)
        except (SafetensorError, *UNREADABLE):
            return None
        whole = whole and values["name"] == name and values["tensors"] == described
        return values if whole else None

    def tensors(self, name: str, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors of a layer that has notes, or those of these full names alone."""
        with safe_open(self._path(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys or file.keys()}

    def pieces(self, name: str) -> list[Piece]:
        """Return where the tensors of a layer lie."""
        return pieces_of(self._path(name))

    def digests(self, name: str) -> dict[str, str]:
        """Return sha256 of the bytes of each tensor of a layer that has notes, by full name."""
        tensors = self._known[name]["tensors"]
        return {key: str(digest) for key, (_, _, digest) in tensors.items()}

    def _path(self, name: str) -> Path:
        # Quoted: a name is the model's, not ours, and '/' in it must not lead anywhere.
        quoted = quote(name, safe="")
        if len(quoted) > LONGEST_NAME:
            quoted = f"{quoted[:100]}-{sha256(name.encode()).hexdigest()}"
        return self.directory / f"{quoted}{SUFFIX}"


def _describe(tensor: Tensor) -> list[Any]:
    """Return dtype, shape and digest of the bytes, little-endian as they are stored."""
    return [str(tensor.dtype), list(tensor.shape), tensor_digest(tensor)]
