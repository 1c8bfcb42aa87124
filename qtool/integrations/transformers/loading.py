"""What transformers loads, held against the reader's checks: files before, modules after.

transformers fills what a file lacks with noise and casts what has another dtype; a quantized weight
survives neither.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from qtool.base import CausalModel, PartSpec
from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.reader import AGAIN, check_headers, check_values
from qtool.checkpoint.shards import Shards, open_files
from qtool.errors import CheckpointError
from qtool.formats._dtypes import dtype_of
from qtool.runtime.modules import QuantizedWeight
from qtool.wording import list_names, shown

_FILES: ContextVar[Sequence[str] | None] = ContextVar("qtool_files", default=None)


def note_files() -> None:
    """Let transformers 4 say which files it loads; later versions say so by themselves.

    To be called between the choice of the quantizer and that of the files.
    """
    from transformers import modeling_utils

    find = modeling_utils._get_resolved_checkpoint_files
    _FILES.set(None)
    if getattr(find, "_noted_by_qtool", False):
        return

    @functools.wraps(find)
    def find_and_note(*args: Any, **kwargs: Any) -> Any:
        found = find(*args, **kwargs)
        _FILES.set(found[0])
        return found

    find_and_note._noted_by_qtool = True  # type: ignore[attr-defined]
    modeling_utils._get_resolved_checkpoint_files = find_and_note


def noted_files() -> Sequence[str] | None:
    """Return the files that transformers has found since `note_files`, None: it has none."""
    return _FILES.get()


def checked_files(files: Sequence[str] | None, manifest: Manifest, model_name: str) -> Shards:
    """Check the files that are about to be loaded, as `CheckpointReader` does.

    Args:
        files: Their paths; None: the caller of transformers has passed tensors.
        manifest: What they should hold.
        model_name: What the caller of transformers has named: a directory, or a hub id.

    Raises:
        CheckpointError: a file isn't safetensors, lies elsewhere, is damaged, or disagrees with
            the manifest.
    """
    if files is None:
        return Shards({})
    paths = [Path(file) for file in files]
    for file, path in zip(files, paths, strict=True):
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{shown(file)}: qtool reads safetensors files only. {AGAIN}")
        if _is_outside(path, Path(model_name)):
            raise CheckpointError(
                f"{shown(file)} isn't in the directory of {model_name}, though its index names it. "
                f"{AGAIN}"
            )
    shards = open_files(paths)
    check_headers(manifest, shards.specs, str(paths[0].parent))
    return shards


def _is_outside(path: Path, root: Path) -> bool:
    """Return whether a path leaves the directory that was named, or goes up in the hub's cache."""
    if not root.is_dir():
        return ".." in path.parts
    return not path.is_relative_to(root) or ".." in path.relative_to(root).parts


def watch_missing(model: CausalModel) -> None:
    """Let transformers 5 raise where a tensor is missing, the next time that it looks."""
    adjust = model._adjust_missing_and_unexpected_keys

    def adjust_and_refuse(info: Any, *args: Any) -> None:
        del model._adjust_missing_and_unexpected_keys
        adjust(info, *args)
        refuse_missing(model, info.missing_keys)

    model._adjust_missing_and_unexpected_keys = adjust_and_refuse


def refuse_missing(model: CausalModel, names: Iterable[str]) -> None:
    """Refuse to load a model with tensors that no file holds.

    A head that the checkpoint's own class doesn't have may be missing: it is to be trained.

    Raises:
        CheckpointError: others are missing.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = sorted(
        name
        for name in names
        if not any(pattern.search(name) for pattern in ignored) and not _is_new(model, name)
    )
    if missing:
        raise CheckpointError(
            f"{model.config.name_or_path} lacks {list_names(missing)}, which "
            f"{type(model).__name__} needs. {AGAIN}"
        )


def is_another_class(model: CausalModel) -> bool:
    """Return whether a model is of another class than the one that was quantized."""
    own = getattr(model.config, "architectures", None) or ()
    return bool(own) and type(model).__name__ not in own


def _is_new(model: CausalModel, name: str) -> bool:
    """Return whether a tensor is outside the part that all classes of a family share."""
    prefix = model.base_model_prefix
    return is_another_class(model) and hasattr(model, prefix) and not name.startswith(f"{prefix}.")


def check_loaded(model: nn.Module, stored_names: Mapping[str, str], shards: Shards) -> None:
    """Check a loaded model: parts of quantized weights, kinds of the rest; undo what was cast.

    transformers 4 casts scales to the dtype of the activations: they are read again.

    Args:
        model: With its weights.
        stored_names: Name of each quantized module -> of the layer in the files.
        shards: The files, empty if tensors were passed.

    Raises:
        CheckpointError: parts were left on the disk, or hold no numbers that scale; or what isn't
            quantized holds no floats.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise CheckpointError(
                f"{name} is stored as {parameter.dtype}, and the model computes with it: a dtype "
                f"of floats is meant. {AGAIN}"
            )
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and name in stored_names:
            for part, spec in module.entry.layout().items():
                _check_part(module, part, spec, f"{stored_names[name]}.{part}", shards)


def _check_part(
    module: QuantizedWeight, part: str, spec: PartSpec, full: str, shards: Shards
) -> None:
    values, stored = module.get_buffer(part), shards.specs.get(full)
    where = full if stored is None else f"{stored.file}: {full}"
    if values.device.type == "meta":
        raise CheckpointError(
            f"{where} has no place in memory: qtool can't leave quantized weights on the disk. "
            "Load without device_map, then move the model."
        )
    if values.dtype != dtype_of(spec.dtype) and stored is not None:
        values = shards.read(full).to(values.device)
        setattr(module, part, values)
    if (values.dtype, tuple(values.shape)) != (dtype_of(spec.dtype), spec.shape):
        raise CheckpointError(
            f"{where} is {values.dtype} {tuple(values.shape)}; its scheme needs {spec.dtype} "
            f"{spec.shape}. {AGAIN}"
        )
    check_values(where, spec, values)
