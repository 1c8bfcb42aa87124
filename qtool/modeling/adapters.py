"""Adapters of a loaded model: any number over one base, one of them or none in force.

The model's quantized layers are asked, whatever class they are of: what has `adapt` and `stored`.
"""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qtool.base import CausalModel
from qtool.checkpoint.adapter import PLANE_OFFSETS, PLANE_SCALES, RANK_DOWN, RANK_UP, LayerAdapter
from qtool.checkpoint.adapter_files import Adapter, base_digest, noted_base, read_adapter
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import CheckpointError, ModelError
from qtool.formats._in_planes import in_planes
from qtool.modeling.config import read_config
from qtool.modeling.locate import Location
from qtool.wording import list_names, shown

NOT_QUANTIZED = (
    "Adapters go on checkpoints of qtool; in this model nothing is quantized. Give the OUT_DIR of "
    "`qtool quantize`."
)
_LOADED: "weakref.WeakKeyDictionary[nn.Module, dict[str, Adapter]]" = weakref.WeakKeyDictionary()
_BASES: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def quantized_modules(model: CausalModel) -> dict[str, Any]:
    """Return the modules with a quantized weight by name, in the order of the model."""
    named = model.named_modules()
    return {name: one for name, one in named if hasattr(one, "adapt") and hasattr(one, "stored")}


def digest_of_base(model: CausalModel) -> str:
    """Return what adapters of this model know it by; taken once, a few seconds for 8B weights.

    Raises:
        ModelError: nothing in the model is quantized by qtool.
    """
    if model not in _BASES:
        modules = quantized_modules(model)
        if not modules:
            raise ModelError(NOT_QUANTIZED)
        _BASES[model] = base_digest(module.stored() for module in modules.values())
    return _BASES[model]


def load_adapter(model: CausalModel, directory: Path | str, name: str | None = None) -> str:
    """Read an adapter, check that it belongs to this model, and set it.

    Args:
        model: A checkpoint of qtool, loaded through transformers or `qtool.load_model`.
        directory: What `qtool adapt` has written.
        name: For `set_adapter`; None: the directory's own name. One that is taken is replaced.

    Returns:
        The name.

    Raises:
        CheckpointError: it is damaged, of another version, or of another base.
        ModelError: the model isn't quantized by qtool.
    """
    directory = Path(directory)
    adapter = read_adapter(directory)
    base = digest_of_base(model)
    if adapter.base != base:
        raise CheckpointError(another_base(adapter, directory, base))
    _check_fits(adapter, quantized_modules(model), directory)
    known = _LOADED.setdefault(model, {})
    name = name or directory.resolve().name
    known[name] = adapter
    set_adapter(model, name)
    return name


def check_belonging(location: Location) -> None:
    """Refuse an adapter that can't go on its model, before weights are read.

    Of a checkpoint whose manifest has no digests that is found when it is loaded.

    Raises:
        CheckpointError: it is damaged, of another version, or of another base.
        ModelError: the model isn't quantized.
    """
    if location.adapter is None:
        return
    adapter, where = read_adapter(location.adapter), location.config_directory()
    if where is None or "quantization_config" not in read_config(where):
        raise ModelError(NOT_QUANTIZED)
    base = noted_base(CheckpointReader(location.directory).manifest)
    if base is not None and base != adapter.base:
        raise CheckpointError(another_base(adapter, location.adapter, base))


def another_base(adapter: Adapter, where: Path, base: str) -> str:
    """Return what is said of an adapter that doesn't belong to a base of that digest."""
    of = adapter.about.get("base_name")
    return (
        f"{where} is an adapter of another base{f', {shown(of)}' if isinstance(of, str) else ''}: "
        f"the digest of its weights is {adapter.base[:12]}, that of this model's {base[:12]}. Give "
        "the checkpoint that it was trained on, or train one with `qtool adapt`."
    )


def set_adapter(model: CausalModel, name: str) -> None:
    """Let a loaded adapter be in force, and no other; planes stay where they are.

    Raises:
        ModelError: none of that name is loaded.
    """
    known = _LOADED.get(model, {})
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise ModelError(f"No adapter {shown(name)} is loaded; known: {names}. Load it first.")
    _adapt(model, known[name].layers)


def disable_adapter(model: CausalModel) -> None:
    """Let the model be its base again, to the bit; its adapters stay loaded."""
    _adapt(model, {})


def _adapt(model: CausalModel, layers: Mapping[str, LayerAdapter]) -> None:
    for name, module in quantized_modules(model).items():
        wanted = layers.get(name, {})
        if wanted or module.adapter:
            module.adapt(wanted)


def _check_fits(adapter: Adapter, modules: Mapping[str, Any], where: Path) -> None:
    """Refuse what its digests don't: parts of a shape that the layer hasn't."""
    unknown = sorted(adapter.layers.keys() - modules.keys())
    if unknown:
        raise CheckpointError(f"{where}: the model has no layer {list_names(unknown)}.")
    for name, parts in adapter.layers.items():
        outputs, inputs = modules[name].entry.shape
        fits = (RANK_DOWN in parts) == (RANK_UP in parts)
        if RANK_DOWN in parts and fits:
            rank = len(parts[RANK_DOWN])
            fits = parts[RANK_DOWN].shape == (rank, inputs) and parts[RANK_UP].shape == (
                outputs,
                rank,
            )
        if fits and (PLANE_SCALES in parts or PLANE_OFFSETS in parts):
            own = in_planes(modules[name].stored()).parts
            new, old = parts.get(PLANE_SCALES, own[PLANE_SCALES]), own[PLANE_SCALES]
            fits = new.shape[1:] == old.shape[1:] and len(new) <= len(old)
            fits = fits and (
                PLANE_OFFSETS not in parts or parts[PLANE_OFFSETS].shape == own[PLANE_OFFSETS].shape
            )
        if not fits:
            raise CheckpointError(f"{where}: {shown(name)} has parts that don't fit its layer.")
