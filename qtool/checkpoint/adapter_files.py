"""A directory with an adapter: one file of tensors, and adapter.json, which is written last."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.adapter import ADAPTER_PARTS, LayerAdapter
from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.place import IGNORED, Place, check_writable, file_failures, find_place
from qtool.checkpoint.publish import exchange
from qtool.checkpoint.reader import tensor_digest
from qtool.errors import CheckpointError, OutputError
from qtool.storage.plain_json import write_json_file
from qtool.storage.whole_files import sync, written_whole
from qtool.wording import list_names, quoted, reason, shown

JOB_NAME_OF_ADAPTER = "job.json"
MANIFEST_NAME, TENSORS_NAME, CURVE_NAME = "adapter.json", "adapter.safetensors", "curve.jsonl"
ADAPTER_FILES = (MANIFEST_NAME, TENSORS_NAME, CURVE_NAME)
STATE_NAME = "state.safetensors"
WORK_FILES = (STATE_NAME, JOB_NAME_OF_ADAPTER)
"""What an unfinished adapter has besides: how far its training is."""
ADAPTER_MARK = "an adapter of qtool"
ADAPTER_VERSION = 1
TRAIN_AGAIN = "Copy the adapter again, or train it again with `qtool adapt`."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as it is stored."""

    kind: str
    """How it was trained."""
    base: str
    """Digest of the quantized weights that it belongs to, see `base_digest`."""
    layers: Mapping[str, LayerAdapter]
    """By name of the layer's module."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained, and what was found: for people."""

    def num_bytes(self) -> int:
        """Return the size of its tensors."""
        tensors = (tensor for parts in self.layers.values() for tensor in parts.values())
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def base_digest(weights: Iterable[QuantizedTensor]) -> str:
    """Return one digest, sha256 in hex, of the stored parts of all quantized weights of a model.

    Their order doesn't matter, nor do their names, which classes of a model write differently.
    """
    lines = (
        " ".join(f"{part} {tensor_digest(weight.parts[part])}" for part in sorted(weight.parts))
        for weight in weights
    )
    return _of_lines(lines)


def noted_base(manifest: Manifest) -> str | None:
    """Return the same of a checkpoint that isn't loaded; None: its manifest has no digests."""
    layers = {name: each for name, each in manifest.layers.items() if each.shared_with is None}
    parts = {name: sorted(entry.layout()) for name, entry in layers.items()}
    noted = manifest.digests
    if not all(f"{name}.{part}" in noted for name, known in parts.items() for part in known):
        return None
    lines = (
        " ".join(f"{part} {noted[f'{name}.{part}']}" for part in known)
        for name, known in parts.items()
    )
    return _of_lines(lines)


def _of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def adapter_digest(directory: Path) -> str:
    """Return what tells an adapter from every other: its manifest has the digests of its tensors.

    Raises:
        OSError: it can't be read.
    """
    return hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()


def find_adapter_place(directory: Path, *, overwrite: bool) -> Place:
    """Return where an adapter goes and is made; it is free, which is known before training.

    Raises:
        OutputError: something is there that isn't ours, or isn't to be replaced; or the place
            can't be written.
    """
    place = find_place(directory, overwrite=overwrite)
    with file_failures(directory):
        check_adapter_place(place)
    return place


def check_adapter_place(place: Place) -> None:
    """Check that an adapter may get its name.

    Raises:
        OutputError: as `find_adapter_place`.
    """
    ignored = IGNORED if place.inside else ()
    _check_free(place.out_dir, ignored, overwrite=place.overwrite)
    check_writable(place)


def _check_free(directory: Path, ignored: Collection[str], *, overwrite: bool) -> None:
    if directory.exists():
        if not directory.is_dir():
            raise OutputError(f"{directory} is a file. Name a directory that doesn't exist yet.")
        names = sorted(path.name for path in directory.iterdir() if path.name not in ignored)
        if not names:
            return
        foreign = [name for name in names if name not in (*ADAPTER_FILES, *WORK_FILES)]
        if foreign or not _is_marked(directory):
            raise OutputError(
                f"{directory} holds what isn't an adapter of qtool: "
                f"{list_names(foreign or names)}. Name another directory."
            )
        if not overwrite:
            raise OutputError(f"{directory} has an adapter. Pass --overwrite to replace it.")


def _is_marked(directory: Path) -> bool:
    try:
        values = json.loads((directory / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("this is") == ADAPTER_MARK


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Write an adapter into a directory; with its manifest, the last file, it is whole.

    Raises:
        OutputError: it can't be written.
    """
    from safetensors.torch import save

    tensors = _named(adapter.layers)
    with file_failures(directory):
        with written_whole(directory / TENSORS_NAME, durable=True) as file:
            file.write(save({name: each.contiguous() for name, each in tensors.items()}))
        write_json_file(
            directory / MANIFEST_NAME,
            {
                "this is": ADAPTER_MARK,
                "adapter_version": ADAPTER_VERSION,
                "kind": adapter.kind,
                "base": adapter.base,
                "digests": {name: tensor_digest(each) for name, each in tensors.items()},
                **adapter.about,
            },
        )


def replace_adapter(finished: Path, directory: Path) -> None:
    """Give a finished adapter its name, in one step where it can; an old one is removed.

    Where it can't, such as on a mount point, the old manifest goes first and the new comes last.

    Args:
        finished: Where it was made: beside the directory, or in it.
        directory: Isn't there, is empty, or has an adapter.

    Raises:
        OutputError: it can't be renamed.
    """
    with file_failures(directory):
        if not directory.exists():
            finished.rename(directory)
        elif finished.parent != directory and exchange(finished, directory):
            empty_adapter(finished)
            finished.rmdir()
        else:
            empty_adapter(directory)
            names = sorted((path.name for path in finished.iterdir()), key=MANIFEST_NAME.__eq__)
            for name in names:
                (finished / name).replace(directory / name)
            finished.rmdir()
        sync(directory.parent)


def empty_adapter(directory: Path) -> None:
    """Remove an adapter's files, or those of an unfinished one, and nothing else."""
    for name in (*ADAPTER_FILES, *WORK_FILES):
        (directory / name).unlink(missing_ok=True)


def _named(layers: Mapping[str, LayerAdapter]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": each for name, parts in layers.items() for part, each in parts.items()
    }


def read_adapter(directory: Path) -> Adapter:
    """Return the adapter of a directory, each tensor compared with its digest.

    Raises:
        CheckpointError: it is missing, damaged, or of a version that isn't known here.
    """
    values = _read_manifest(directory)
    tensors = _read_tensors(directory / TENSORS_NAME)
    digests = values["digests"]
    damaged = sorted(digests.keys() ^ tensors.keys())
    damaged += [name for name in tensors if tensor_digest(tensors[name]) != digests.get(name)]
    if damaged:
        raise CheckpointError(
            f"{directory}: {list_names(sorted({*damaged}))} isn't what was written. {TRAIN_AGAIN}"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, part = full.rpartition(".")
        if part not in ADAPTER_PARTS:
            raise CheckpointError(f"{directory}: {shown(full)} is no part of an adapter.")
        layers.setdefault(name, {})[part] = tensor
    named = ("this is", "adapter_version", "kind", "base", "digests")
    about = {key: value for key, value in values.items() if key not in named}
    return Adapter(kind=values["kind"], base=values["base"], layers=layers, about=about)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_NAME
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is no adapter: it has no {MANIFEST_NAME}. `qtool adapt` makes one."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {reason(error)}. {TRAIN_AGAIN}") from error
    if not isinstance(values, dict) or values.get("this is") != ADAPTER_MARK:
        raise CheckpointError(f"{path} isn't that of an adapter of qtool. {TRAIN_AGAIN}")
    version = values.get("adapter_version")
    if version != ADAPTER_VERSION:
        raise CheckpointError(
            f"{path} is of adapter version {quoted(version)}, and this qtool knows "
            f"{ADAPTER_VERSION}. Train it again here, or use the qtool that wrote it."
        )
    texts = all(type(values.get(key)) is str for key in ("kind", "base"))
    if not texts or not isinstance(values.get("digests"), dict):
        raise CheckpointError(f"{path} lacks kind, base or digests. {TRAIN_AGAIN}")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read: {reason(error)}. {TRAIN_AGAIN}") from error
