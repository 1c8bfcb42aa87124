"""The empty model: what transformers builds from a configuration, compared with what is stored."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from qtool.base import CausalModel, ModelConfig
from qtool.checkpoint.shards import Shards, TensorSpec
from qtool.errors import CheckpointError
from qtool.formats._dtypes import DTYPES
from qtool.modeling.config import auto_class, transformers_failures
from qtool.wording import list_names, shown

FLOAT_DTYPES = ("F16", "BF16", "F32")
BUFFERS_OF_OLD = r"rotary_emb\.inv_freq$|(attn|attention)\.(masked_)?bias$"
"""Names of tables and masks that earlier versions of transformers stored."""
Renaming = Callable[[str], tuple[str, tuple[str, ...]]]
"""From a stored name to the model's, and to all names that its values go to if it is converted."""


def empty_model(config: ModelConfig, directory: Path) -> CausalModel:
    """Return the model of a configuration, its tensors without memory.

    Raises:
        ModelError: transformers can't build it.
    """
    what = f"{directory}: transformers can't build this model without remote code"
    with transformers_failures(what), torch.device("meta"):
        # A copy: the model notes its dtype in the configuration that it is built of.
        own = deepcopy(config)
        return auto_class(own).from_config(own, dtype=torch.float32, trust_remote_code=False)


def match_names(model: CausalModel, shards: Shards, directory: Path) -> dict[str, str]:
    """Find each tensor of a model among those stored, by transformers' own renaming.

    Of tensors that are one object, as a tied head and its embedding, one must be stored.

    Returns:
        Stored name by the model's name, of all parameters and persistent buffers.

    Raises:
        CheckpointError: something isn't stored, or in another shape, or not as the floats it is.
    """
    wanted = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    found, merged = _renamed(model, shards.specs, wanted)
    unknown = sorted({*shards.specs} - {*found.values()} - merged)
    groups = defaultdict(list)
    for name, value in wanted.items():
        groups[id(value)].append(name)
    missing = []
    for names in groups.values():
        there = next((name for name in names if name in found), None)
        if there is not None:
            found.update({name: found[there] for name in names if name not in found})
        elif not merged.intersection(names) and not _may_be_missing(model, names[0]):
            missing.append(names[0])
    if missing:
        raise CheckpointError(missing_message(missing, unknown, directory))
    for name, stored in found.items():
        _check_spec(name, wanted[name], shards.specs[stored])
    return found


def missing_message(missing: Iterable[str], unknown: Iterable[str], directory: Path) -> str:
    """Return the sentence about tensors that nobody stored, and what is stored in their place."""
    others = list_names(unknown)
    return (
        f"{directory}: the model needs tensors that aren't stored: {list_names(missing)}. Download "
        "it again, or see whether config.json belongs to these weights"
        + (f"; stored and unknown to the model: {others}." if others else ".")
    )


def _may_be_missing(model: CausalModel, name: str) -> bool:
    patterns = model._keys_to_ignore_on_load_missing or ()
    return any(re.search(pattern, name) for pattern in patterns)


def is_left_over(model: CausalModel, name: str) -> bool:
    """Return whether a tensor of that name is stored for nothing, as transformers has it."""
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), BUFFERS_OF_OLD)
    return any(re.search(pattern, name) for pattern in patterns)


def _check_spec(name: str, wanted: torch.Tensor, spec: TensorSpec) -> None:
    """Compare shape and kind of number; of floats, another width is cast."""
    shape = tuple(wanted.shape)
    if spec.shape != shape:
        raise CheckpointError(
            f"{spec.file}: the shape of {name} is {spec.shape}, and config.json makes it {shape}. "
            "config.json and weights don't belong together."
        )
    dtype = DTYPES.get(spec.dtype)
    if wanted.is_floating_point() and not (dtype and dtype.is_floating_point):
        raise CheckpointError(dtype_message(name, spec))


def dtype_message(name: str, spec: TensorSpec) -> str:
    """Return the sentence about a tensor that is stored as nothing that is read for it."""
    return (
        f"{spec.file}: {name} is {spec.dtype}; qtool reads {', '.join(FLOAT_DTYPES)}. Load the "
        "model with transformers in one of these and save_pretrained() it; if it is quantized "
        "already, start from the original."
    )


def _renamed(
    model: CausalModel, stored: Iterable[str], wanted: Mapping[str, Any]
) -> tuple[dict[str, str], set[str]]:
    """Return stored names by the model's, and both names of those that loading merges or splits."""
    found: dict[str, str] = {}
    merged: set[str] = set()
    rename = _renaming(model, wanted)
    for name in stored:
        renamed, targets = rename(name)
        if renamed not in wanted and name in wanted:
            renamed, targets = name, ()
        if targets:
            merged.update(targets, [name])
        elif renamed in found:
            raise CheckpointError(
                f"Both {shown(found[renamed])} and {shown(name)} are stored, and the model reads "
                f"both as {renamed}. Remove those that aren't meant from the files."
            )
        elif renamed in wanted:
            found[renamed] = name
    return found, merged


def _renaming(model: CausalModel, wanted: Mapping[str, Any]) -> Renaming:
    """Return what transformers does to a stored name: 5.x has tables, 4.57 a few rules."""
    try:
        from transformers import core_model_loading
    except ImportError:
        return lambda name: (_prefixed(model, name, wanted), ())
    renamings, converters = transforms_of(model)
    targets = {p: tuple(c.target_patterns) for c in converters for p in c.source_patterns}

    def rename(name: str) -> tuple[str, tuple[str, ...]]:
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        made = targets.get(pattern, ())
        return renamed, tuple(renamed.replace(made[0], target) for target in made)

    return rename


def transforms_of(model: CausalModel) -> tuple[list[Any], list[Any]]:
    """Return what transformers 5 does to stored names, and to values on top of that."""
    from transformers import conversion_mapping, core_model_loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, core_model_loading.WeightConverter)]
    return renamings, converters


def _prefixed(model: CausalModel, name: str, wanted: Mapping[str, Any]) -> str:
    renamed: str = model._fix_state_dict_key_on_load(name)[0]
    full = f"{model.base_model_prefix}.{renamed}"
    return full if full in wanted else renamed
