"""`adapt --merge`: a checkpoint that is its base with an adapter."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool.base import Emit, Notice, Progress, QuantizedTensor, ignore_events
from qtool.checkpoint.adapter import RANK_DOWN, RANK_UP, LayerAdapter, with_adapter
from qtool.checkpoint.adapter_files import Adapter, base_digest, read_adapter
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.place import find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import CheckpointError
from qtool.formats.binary_coding import planes_in_order
from qtool.modeling.adapters import another_base
from qtool.modeling.locate import Location
from qtool.pipeline.rewritten import rewrite
from qtool.wording import list_names

MERGING = "merging"
LOST = (
    "Low-rank parts don't fit into codes: each weight took the nearest level there is, and {:.0%} "
    "of the change is lost (in squares). `--adapter` keeps all of it."
)


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written."""

    out_dir: Path
    changed: int
    """Layers that the adapter has changed."""
    lost: float | None
    """Of a low-rank change, the share of its squares that no code could take; None: it is exact."""


def merge_adapter(
    model: Location,
    adapter_dir: Path,
    out_dir: Path,
    *,
    overwrite: bool = False,
    emit: Emit = ignore_events,
) -> MergeResult:
    """Write a checkpoint with an adapter in it: exact for scales, to the nearest code for low rank.

    Raises:
        CheckpointError: base or adapter is damaged, or they don't belong together.
        OutputError: something is at `out_dir`, or it can't be written.
    """
    place = find_place(out_dir, overwrite=overwrite)
    check_apart(place.out_dir, model.directory, [adapter_dir])
    look(place)
    reader, adapter = CheckpointReader(model.directory), read_adapter(adapter_dir)
    emit(Progress("comparing the base with the adapter's"))
    _check_base(reader, adapter, adapter_dir)
    lost = _Lost()
    with CheckpointWriter(place, {"merge": adapter.base, "of": adapter.kind}) as writer:
        changes = adapter.layers
        rewrite(
            reader,
            writer,
            lambda name, weight: _merged(weight, changes.get(name, {}), lost),
            {"merged adapter": adapter.kind},
            emit,
            MERGING,
        )
    if lost.share is not None:
        emit(Notice(LOST.format(lost.share)))
    return MergeResult(place.named, len(adapter.layers), lost.share)


def _check_base(reader: CheckpointReader, adapter: Adapter, where: Path) -> None:
    layers = reader.manifest.layers
    weights = (reader.load(name) for name, entry in layers.items() if entry.shared_with is None)
    found = base_digest(weight for weight in weights if isinstance(weight, QuantizedTensor))
    if found != adapter.base:
        raise CheckpointError(another_base(adapter, where, found))
    unknown = sorted(adapter.layers.keys() - layers.keys())
    if unknown:
        raise CheckpointError(f"{where}: the checkpoint has no layer {list_names(unknown)}.")


class _Lost:
    """Sums up how much of low-rank changes no code could take."""

    def __init__(self) -> None:
        self._wanted = self._missed = 0.0

    @property
    def share(self) -> float | None:
        return self._missed / self._wanted if self._wanted else None

    def add(self, old: Tensor, new: Tensor, change: Tensor) -> None:
        """Take up a weight before and after, and what was meant to be added."""
        self._wanted += float(change.square().sum())
        self._missed += float((old + change - new).square().sum())


def _merged(
    weight: QuantizedTensor | Tensor, changes: LayerAdapter, lost: _Lost
) -> QuantizedTensor | Tensor:
    if not isinstance(weight, QuantizedTensor) or not changes:
        return weight
    new = with_adapter(weight, changes)
    if RANK_UP not in changes:
        new = planes_in_order(new)
    else:
        old, now = (codec(one.format).dequantize(one, torch.float32) for one in (weight, new))
        lost.add(old, now, changes[RANK_UP].float() @ changes[RANK_DOWN].float())
    return new
