"""`export`: a checkpoint in the format of another program, proved by reading it back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qtool.base import CausalModel, Emit, Progress, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.fresh import find_fresh, made_fresh
from qtool.checkpoint.manifest import LayerEntry
from qtool.checkpoint.marks import CONFIG_NAME
from qtool.checkpoint.place import file_failures
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.experts import expert_name, separated
from qtool.errors import CheckpointError, OutputError
from qtool.exchange import (
    Compared,
    Departure,
    Exchange,
    LayerPlace,
    exchange_names,
    load_exchange,
)
from qtool.exchange._engines import Kernels, kernels_of, why_no_kernel
from qtool.modeling.companions import read_companions
from qtool.modeling.config import parse_config
from qtool.modeling.discover import known_adapter
from qtool.modeling.skeleton import empty_model
from qtool.pipeline.expert_export import ExpertCheckpoint
from qtool.steps.check_exportable import JOINED_EXPERTS
from qtool.wording import first_alike, list_names

DTYPES_OF_EXPORTS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written."""

    dest: Path
    target: str
    engine: str | None
    num_bytes: int
    compared: Compared


def export(
    directory: Path,
    dest: Path,
    target: str,
    *,
    engine: str | None = None,
    dtype: str | None = None,
    emit: Emit = ignore_events,
) -> ExportResult:
    """Write a checkpoint in the format of another program, and compare it bit by bit.

    Args:
        directory: The checkpoint.
        dest: Isn't there yet; appears only when it is complete and compared. A directory, or a file
            where the target is of one, whose name ends as it must.
        target: Name of an exchange that can be written.
        engine: Program that is to run it, as NAME or NAME@VERSION; what it has no kernels for is
            refused. None: anybody.
        dtype: Of what has no codes; None: as the configuration has it.
        emit: Is told how far it is.

    Raises:
        UnknownNameError: there is no such target or engine.
        CheckpointError: the checkpoint is damaged, a layer can't be said in that format, or the
            result isn't equal; nothing is left at `dest`.
        OutputError: something is at `dest`, or it can't be written.
    """
    exchange = writable(target)
    kernels = None if engine is None else kernels_of(engine, target)
    check_suffix(dest, target, exchange)
    place = find_fresh(dest)
    check_apart(place.out_dir, directory)
    departure = open_departure(directory, dtype, emit)
    emit(Progress("checking what is to be written"))
    check_expressible(departure, target, exchange)
    if kernels is not None:
        check_kernels(departure, str(engine), kernels)
    assert exchange.write is not None
    assert exchange.compare is not None
    with made_fresh(dest) as work, file_failures(dest):
        exchange.write(departure, work)
        compared = exchange.compare(departure, work)
    return ExportResult(
        dest=dest, target=target, engine=engine, num_bytes=size_of(dest), compared=compared
    )


def writable(target: str) -> Exchange:
    """Return an exchange that writes.

    Raises:
        CheckpointError: it only reads; or UnknownNameError, there is none.
    """
    exchange = load_exchange(target)
    if exchange.write is None or exchange.refuses is None or exchange.compare is None:
        able = [name for name in exchange_names() if load_exchange(name).write is not None]
        raise CheckpointError(f"{target} is only read. Targets are {', '.join(able)}.")
    return exchange


def check_suffix(dest: Path, target: str, exchange: Exchange) -> None:
    """Check that the name of a file ends as its readers expect.

    Raises:
        OutputError: it doesn't.
    """
    suffix = exchange.suffix
    if suffix is not None and not dest.name.endswith(suffix):
        raise OutputError(
            f"{dest}: {target} is one file whose name ends with {suffix}. Name {dest.name}{suffix}."
        )


def size_of(path: Path) -> int:
    """Return the size of a file, or of all files of a directory."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


def open_departure(directory: Path, dtype: str | None, emit: Emit) -> Departure:
    """Open a checkpoint for writing it in another format.

    Raises:
        CheckpointError: it is damaged, or not ours.
        ModelError: transformers can't build its model.
    """
    checkpoint = CheckpointReader(directory)
    parsed = parse_config(checkpoint.plain_config(), directory)
    skeleton = empty_model(parsed, directory)
    if any(map(expert_name, checkpoint.manifest.layers)):
        checkpoint = ExpertCheckpoint(directory, skeleton)
    family = parsed.model_type
    places, transposed = layer_places(separated(skeleton), family, checkpoint.manifest.layers)
    named = str(parsed.dtype).removeprefix("torch.")
    return Departure(
        checkpoint=checkpoint,
        parsed=parsed,
        places=places,
        transposed=transposed,
        linears=_linears(skeleton, checkpoint),
        files=read_companions(directory),
        dtype=dtype or (named if named in DTYPES_OF_EXPORTS else "float16"),
        is_dtype_asked=dtype is not None,
        emit=emit,
    )


def _linears(skeleton: CausalModel, checkpoint: CheckpointReader) -> tuple[str, ...]:
    """Return all linears of a model; those of experts as files have them."""
    own = (name for name, part in skeleton.named_modules() if isinstance(part, nn.Linear))
    apart = checkpoint.linears() if isinstance(checkpoint, ExpertCheckpoint) else ()
    return (*own, *apart)


def layer_places(
    skeleton: CausalModel, family: str, layers: Mapping[str, LayerEntry]
) -> tuple[dict[str, LayerPlace], frozenset[str]]:
    """Return where each layer stands, and which are stored as (in_features, out_features)."""
    adapter = known_adapter(skeleton, family)
    tables: dict[str, LayerPlace] = {adapter.embedding: "embedding", adapter.head: "head"}
    places: dict[str, LayerPlace] = {name: tables.get(name, "block") for name in layers}
    inside = {name for name, place in places.items() if place == "block"}
    return places, frozenset(inside if adapter.conv1d else ())


def check_expressible(departure: Departure, target: str, exchange: Exchange) -> None:
    """Check that all of a checkpoint can be said in a format.

    Raises:
        CheckpointError: it can't: names layers, and the formats that take them.
    """
    assert exchange.refuses is not None
    where = departure.checkpoint.directory
    if isinstance(departure.checkpoint, ExpertCheckpoint) and not exchange.takes_floats:
        joined = departure.checkpoint.joined
        if joined is not None:
            raise CheckpointError(f"{where}: {JOINED_EXPERTS.format(target=target, name=joined)}")
    layers = departure.checkpoint.manifest.layers
    found = {
        name: reason
        for name, entry in layers.items()
        if (reason := exchange.refuses(entry, departure.places[name])) is not None
    }
    if found:
        alike, reason = first_alike(found)
        raise CheckpointError(
            f"{where}: {target} can't say {list_names(alike)}: {reason}. {_nearest(departure)}",
            layer=alike[0],
            file=where / CONFIG_NAME,
        )
    message = exchange.refuses_model(departure)
    if message is not None:
        raise CheckpointError(f"{where}: {message} {_nearest(departure)}")


def check_kernels(departure: Departure, engine: str, kernels: Kernels) -> None:
    """Check that an engine has kernels for all of a checkpoint.

    Raises:
        CheckpointError: it hasn't: names layers, and what it takes.
    """
    where, layers = departure.checkpoint.directory, departure.checkpoint.manifest.layers
    found = {
        name: reason
        for name, entry in layers.items()
        if (reason := why_no_kernel(kernels, entry)) is not None
    }
    if found:
        alike, reason = first_alike(found)
        raise CheckpointError(
            f"{where}: {engine} has no kernel for {list_names(alike)}: {reason}. Quantize it so, "
            "leave out --engine, or give --target dense.",
            layer=alike[0],
            file=where / CONFIG_NAME,
        )


def _nearest(departure: Departure) -> str:
    """Say which targets take all of a checkpoint."""
    layers = departure.checkpoint.manifest.layers
    able = []
    for name in exchange_names():
        exchange = load_exchange(name)
        refuses = exchange.refuses
        if refuses is None or exchange.refuses_model(departure) is not None:
            continue
        if all(refuses(entry, departure.places[layer]) is None for layer, entry in layers.items()):
            able.append(f"--target {name}")
    return f"This checkpoint goes to: {', '.join(able)}." if able else "Nor does another target."
