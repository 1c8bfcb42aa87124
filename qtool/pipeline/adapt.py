"""`adapt`: train an adapter on a checkpoint, whose planes stay as they are."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qtool
from qtool.base import Emit, Notice, ignore_events
from qtool.checkpoint.adapter_files import Adapter, find_adapter_place, write_adapter
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import ModelError
from qtool.modeling.adapters import digest_of_base
from qtool.modeling.device import default_device
from qtool.modeling.digest import model_digest
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location, locate
from qtool.modeling.source import open_source
from qtool.pipeline.learned_data import read_curriculum
from qtool.steps.adapt_model import Adapted, AdaptOptions, Base, adapt_model
from qtool.steps.unfinished_adapter import open_unfinished
from qtool.storage.digests import files_digest
from qtool.training.adapters import Installed, load_kind


@dataclass(frozen=True, slots=True)
class AdaptResult:
    """What `adapt` has made."""

    directory: Path
    kind: str
    num_parameters: int
    """How many numbers learned."""
    num_bytes: int
    """Of the adapter's tensors."""
    first_loss: float
    """On the held-out exercises, nats per learned token, before."""
    best_loss: float
    steps: int
    tokens_per_second: float
    seconds: float
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptRequest:
    """What is adapted to what, and where the adapter goes."""

    model: Location
    data: Path
    directory: Path
    kind: str = "alpha"
    validation: Path | None = None
    """Exercises to look at; None: some of `data` are held out."""
    original: Location | None = None
    """What was quantized; None: what the checkpoint names as its source, if anything."""
    options: AdaptOptions = field(default_factory=AdaptOptions)
    overwrite: bool = False
    resume: bool = False


def adapt(request: AdaptRequest, *, emit: Emit = ignore_events) -> AdaptResult:
    """Train an adapter and write it.

    Raises:
        OutputError: before anything is read: the place isn't free.
        DataError: the data can't be read, or teach nothing.
        ModelError: the model isn't a checkpoint of qtool.
        QtoolError: the kind of adapter doesn't go on it.
    """
    begun, kind = time.perf_counter(), load_kind(request.kind)
    files = [request.data, *filter(None, [request.validation])]
    request.options.checked(kind)
    place = find_adapter_place(request.directory, overwrite=request.overwrite)
    check_apart(place.out_dir, request.model.directory, files)
    CheckpointReader(request.model.directory)  # refuses what isn't quantized, before it is loaded
    # float16 has too little range for gradients
    on_card = default_device().type == "cuda"
    loaded = load_model(request.model, dtype=torch.bfloat16 if on_card else None)
    about = {"tool_version": qtool.__version__, "options": asdict(request.options)}
    base = digest_of_base(loaded.model)
    read = {"files": model_digest(request.model.directory), "data": files_digest(files)}
    job = {"kind": request.kind, "base": base, **read, **about}
    flags = {"overwrite": request.overwrite, "resume": request.resume}
    with contextlib.closing(open_unfinished(place, job, **flags)) as unfinished:
        curriculum = read_curriculum(
            request.data, request.validation, loaded, request.options, emit
        )
        subject = Base(loaded, _original(request))
        done = adapt_model(subject, kind, request.options, curriculum, unfinished, emit)
        adapter = Adapter(
            kind=request.kind,
            base=base,
            layers=_stored(done.installed),
            about={**about, "base_name": loaded.name, **_found(done)},
        )
        if done.best_loss == done.points[0].held_out:
            emit(
                Notice("Learning gained nothing: the adapter is as it began. Try --learning-rate.")
            )
        write_adapter(unfinished.directory, adapter)
        unfinished.finish(place.out_dir)
    return _result(request, done, adapter, time.perf_counter() - begun)


def _result(request: AdaptRequest, done: Adapted, adapter: Adapter, seconds: float) -> AdaptResult:
    return AdaptResult(
        directory=request.directory,
        kind=request.kind,
        num_parameters=done.installed.num_parameters,
        num_bytes=adapter.num_bytes(),
        first_loss=done.points[0].held_out,
        best_loss=done.best_loss,
        steps=done.points[-1].step,
        tokens_per_second=done.tokens_per_second,
        seconds=seconds,
        notes=done.installed.notes,
    )


def _found(done: Adapted) -> dict[str, Any]:
    """Return what a manifest says of a run."""
    return {
        "num_parameters": done.installed.num_parameters,
        "losses": {"before": done.points[0].held_out, "after": done.best_loss},
        **done.installed.notes,
    }


def _original(request: AdaptRequest) -> Callable[[str], Tensor] | None:
    """Return what reads weights of the original; None: nobody knows where it is.

    Raises:
        ModelError: it isn't there, or factors were folded into it before it was quantized.
    """
    manifest = CheckpointReader(request.model.directory).manifest
    location = request.original
    if location is None and manifest.source is not None:
        location = locate(manifest.source)
    if location is None:
        return None
    if manifest.recipe.get("fold"):
        if request.original is None:
            return None
        raise ModelError(
            "The original can't be compared with this checkpoint: factors were folded into its "
            "weights first. Leave out --original."
        )
    return open_source(location).read_weight


def _stored(installed: Installed) -> dict[str, dict[str, Tensor]]:
    return {
        name: {part: tensor.cpu() for part, tensor in parts.items()}
        for name, parts in installed.stored().items()
    }
