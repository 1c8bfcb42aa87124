"""Where the weights of single experts are stored: by themselves, or in a tensor of all of them.

transformers 5 fuses what checkpoints store expert by expert, by its own table of conversions. The
same conversions are run here for one expert at a time.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.base import CausalModel
from qtool.checkpoint.shards import Shards, TensorSpec
from qtool.core.experts import fused_shapes
from qtool.errors import CheckpointError, ModelError
from qtool.modeling.skeleton import FLOAT_DTYPES, dtype_message, transforms_of
from qtool.scheme import Shape2D


@dataclass(frozen=True, slots=True)
class StoredExpert:
    """One weight of one expert in the files."""

    fused: str
    """Dotted name of the tensor that transformers makes of those of all experts."""
    shape: Shape2D
    is_transposed: bool
    """The tensor of all experts has (in_features, out_features) of each."""
    pieces: tuple[tuple[str, str, int | None], ...]
    """Of each tensor that holds a part: transformers' pattern of its name, its name, and which
    expert's it is to take; None: it is that expert's alone."""
    converter: Any = None
    """transformers' rule that makes one tensor of the pieces; None: there is one piece."""

    def names(self) -> Iterator[str]:
        """Yield the names of the tensors that hold a part."""
        for _, name, _ in self.pieces:
            yield name

    def read(self, shards: Shards) -> Tensor:
        """Return the weight, (out_features, in_features), in the dtype that it is stored in."""
        parts = {
            pattern: shards.read(name) if index is None else shards.read_entry(name, index)
            for pattern, name, index in self.pieces
        }
        if self.converter is None:
            (weight,) = parts.values()
        else:
            weight = self._converted(parts)
        return weight.T.contiguous() if self.is_transposed else weight

    def _converted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Do what transformers does, as if there were no other expert."""
        rule = deepcopy(self.converter)
        for pattern, name, index in self.pieces:
            part = parts[pattern]
            rule.add_tensor(self.fused, name, pattern, part if index is None else part[None])
        (made,) = rule.convert(self.fused).values()
        weight: Tensor = (made[0] if isinstance(made, list) else made)[0]
        return weight


def find_experts(model: CausalModel, shards: Shards, directory: Path) -> dict[str, StoredExpert]:
    """Find the weights of the experts that a model fuses, by the full names that qtool gives them.

    Args:
        model: As transformers builds it, without memory.
        shards: What is stored.
        directory: For messages.

    Raises:
        CheckpointError: the weights of an expert aren't stored, or not as floats.
        ModelError: transformers makes something of them that can't be told expert by expert.
    """
    wanted = fused_shapes(model)
    if not wanted:
        return {}
    renamings, converters = transforms_of(model)
    rules = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shards.specs, key=_natural):
        renamed, pattern = _renamed(model, name, renamings, converters, wanted)
        found[renamed][pattern or ""].append(name)
    experts: dict[str, StoredExpert] = {}
    for fused, (shape, is_transposed) in wanted.items():
        if fused not in found:
            raise CheckpointError(
                f"{directory}: the model needs {fused}, the weights of its experts, and nothing "
                "stored is made into it. Download it again."
            )
        sources = found[fused]
        for index in range(shape[0]):
            pieces = tuple(
                _piece(pattern, names, index, shape, shards.specs, directory)
                for pattern, names in sources.items()
            )
            rows, columns = (shape[2], shape[1]) if is_transposed else (shape[1], shape[2])
            rule = next((rules[pattern] for pattern in sources if pattern), None)
            _check_rule(fused, rule, pieces, directory)
            experts[f"{fused}[{index}].weight"] = StoredExpert(
                fused, Shape2D(rows, columns), is_transposed, pieces, rule
            )
    return experts


def _renamed(
    model: CausalModel,
    name: str,
    renamings: Sequence[Any],
    converters: Sequence[Any],
    wanted: Mapping[str, Any],
) -> tuple[str, str | None]:
    """Return a stored name as the model has it, and the pattern of the conversion, if it has one.

    A name that is the model's own already is left alone.
    """
    from transformers import core_model_loading

    renamed, pattern = core_model_loading.rename_source_key(
        name, renamings, converters, model.base_model_prefix, wanted
    )
    return (name, None) if renamed not in wanted and name in wanted else (renamed, pattern)


def _piece(
    pattern: str,
    names: Sequence[str],
    index: int,
    shape: Sequence[int],
    specs: Mapping[str, TensorSpec],
    directory: Path,
) -> tuple[str, str, int | None]:
    """Return the tensor of one expert, or the one of all with the expert's number."""
    spec = specs[names[0]]
    if spec.dtype not in FLOAT_DTYPES:
        raise CheckpointError(dtype_message(names[0], spec))
    if len(names) == 1 and len(spec.shape) == len(shape) and spec.shape[0] == shape[0]:
        return pattern, names[0], index
    if len(names) != shape[0]:
        raise CheckpointError(
            f"{directory}: config.json makes {shape[0]} experts, and {len(names)} tensors as "
            f"{names[0]} are stored. config.json and weights don't belong together."
        )
    return pattern, names[index], None


def _check_rule(fused: str, rule: Any, pieces: Sequence[Any], directory: Path) -> None:  # noqa: ANN401
    targets = () if rule is None else rule.target_patterns
    if len(targets) > 1 or (rule is None and len(pieces) > 1):
        raise ModelError(
            f"{directory}: transformers makes {fused} of tensors that hold more than one of its "
            "like, and qtool can't take an expert out of these. Load the model with transformers "
            "and save_pretrained(..., save_original_format=False) it."
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort numbers in a name as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
