"""What files call the experts that transformers 5 fuses: the way back, for other programs.

`save_pretrained` undoes the conversions of loading, so that files look as they were published.
What that does to a tensor of all experts is found out here on one that numbers its rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.base import CausalModel
from qtool.core.experts import fused_shapes
from qtool.modeling.config import transformers_failures

_DIMENSIONS = 2
"""Dimensions of a weight that is stored by itself."""


@dataclass(frozen=True, slots=True)
class ExpertPiece:
    """Rows of one expert's weight that files hold by themselves."""

    name: str
    """Full name of the tensor, such as `...experts.7.w1.weight`."""
    start: int
    """First of the rows."""
    count: int
    """How many there are."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How files hold one weight of all experts of a block."""

    fused: str
    """Full name of the tensor that holds all of it, where it isn't in pieces."""
    num_experts: int
    is_transposed: bool
    """That tensor has (in_features, out_features) of each expert."""
    pieces: dict[int, tuple[ExpertPiece, ...]]
    """Of each expert; empty: files have one tensor of all."""


def expert_layouts(model: CausalModel) -> dict[str, ExpertLayout]:
    """Return the layouts by the dotted names of the fused weights, such as `...experts.down_proj`.

    Args:
        model: As transformers builds it, without memory.

    Raises:
        ModelError: transformers makes something else of them than rows and tensors of all.
    """
    found = {}
    for fused, (shape, is_transposed) in fused_shapes(model).items():
        with transformers_failures(f"transformers can't say how files hold {fused}"):
            found[fused] = _layout(model, fused, shape[:2], is_transposed=is_transposed)
    return found


def name_in_files(model: CausalModel, name: str) -> str:
    """Return what files call a tensor beside the experts, such as a router.

    Args:
        model: As transformers builds it, without memory.
        name: Full name that the model has for it; another one is returned as it is.
    """
    from transformers.core_model_loading import revert_weight_conversion

    numbered = torch.arange(2, dtype=torch.int32)
    try:
        made = revert_weight_conversion(model, {name: numbered})
    except Exception:  # noqa: BLE001 - a rule that computes, and wants its real tensors
        return name
    alike = [found for found, values in made.items() if torch.equal(values, numbered)]
    return alike[0] if len(made) == len(alike) == 1 else name


def _layout(
    model: CausalModel, fused: str, shape: tuple[int, ...], *, is_transposed: bool
) -> ExpertLayout:
    """Let transformers undo its conversions of a tensor whose rows have one number each."""
    from transformers.core_model_loading import revert_weight_conversion

    count, rows = shape
    numbered = torch.arange(count * rows, dtype=torch.int32).view(count, rows, 1)
    made = revert_weight_conversion(model, {fused: numbered})
    (first, *others) = made.items()
    if not others and torch.equal(first[1], numbered):
        return ExpertLayout(first[0], count, is_transposed, {})
    pieces: dict[int, list[ExpertPiece]] = {}
    for name, values in made.items():
        number, piece = _piece(name, values, rows)
        pieces.setdefault(number, []).append(piece)
    ordered = {n: tuple(sorted(pieces[n], key=lambda one: one.start)) for n in sorted(pieces)}
    if is_transposed or any(not _covers(each, rows) for each in ordered.values()):
        raise ValueError("rows of its experts are stored in another order")
    return ExpertLayout(fused, count, is_transposed, ordered)


def _piece(name: str, values: Tensor, rows: int) -> tuple[int, ExpertPiece]:
    """Return whose rows a tensor holds, and which; they are neighbours, in order."""
    numbers = values.flatten()
    start = int(numbers[0])
    is_run = torch.equal(numbers, torch.arange(start, start + len(numbers), dtype=torch.int32))
    if values.dim() != _DIMENSIONS or not is_run:
        raise ValueError(f"{name} isn't made of neighbouring rows of one expert")
    return start // rows, ExpertPiece(name, start % rows, len(numbers))


def _covers(pieces: tuple[ExpertPiece, ...], rows: int) -> bool:
    """Return whether pieces, in order, are all of the rows of an expert."""
    ends = [0, *(one.start + one.count for one in pieces)]
    return ends[-1] == rows and all(
        one.start == end for one, end in zip(pieces, ends, strict=False)
    )
