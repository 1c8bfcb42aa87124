"""`import`: a model that another program has quantized, as a checkpoint of ours, without loss."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

import qtool
from qtool.base import Emit, Notice, Progress, QuantizedTensor, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.manifest import LayerEntry, Manifest, scheme_from_json
from qtool.checkpoint.marks import CONFIG_NAME, REPORT_NAME
from qtool.checkpoint.place import find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import CheckpointError
from qtool.exchange import ForeignModel, exchange_names, exchange_of, load_exchange
from qtool.modeling.companions import read_companions
from qtool.modeling.config import parse_config, read_config
from qtool.modeling.digest import model_states
from qtool.modeling.load import foreign_method
from qtool.modeling.locate import Location
from qtool.modeling.skeleton import empty_model, is_left_over, missing_message
from qtool.pipeline.model_figures import versions
from qtool.scheme import Shape2D
from qtool.storage.digests import State, state_of
from qtool.storage.plain_json import json_text
from qtool.wording import list_names, shown

IMPORTING = "importing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """What was written."""

    out_dir: Path
    format: str
    """Name of the exchange that has read the model."""
    layers: Mapping[str, LayerEntry]
    average_bits: float
    weight_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """What is imported from where, and who takes it."""

    name: str
    """Of the exchange."""
    path: Path
    writer: CheckpointWriter
    emit: Emit


def import_model(
    model: Location,
    out_dir: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    emit: Emit = ignore_events,
) -> ImportResult:
    """Write a checkpoint that means to the bit what a model of another program means.

    Args:
        model: A directory, or a file, that an exchange reads.
        out_dir: Where the checkpoint goes; appears only when it is complete.
        overwrite: Replace a checkpoint that is there, and drop an unfinished import.
        resume: Continue an unfinished import of the same files.
        emit: Is told of each layer.

    Raises:
        CheckpointError: no exchange reads the model, or it is damaged.
        ModelError: it isn't the model that its configuration describes.
        OutputError: something is at `out_dir`, or it can't be written.
    """
    started = time.perf_counter()
    place = find_place(out_dir, overwrite=overwrite, resume=resume)
    path = path_of(model)
    check_apart(place.out_dir, path)
    look(place)
    name = exchange_of(path)
    read = None if name is None else load_exchange(name).read
    if name is None or read is None:
        raise CheckpointError(_unknown(path))
    about = {"import": name, "model": str(path), "files": _states(path)}
    with CheckpointWriter(place, about) as writer:
        if writer.is_sealed:
            writer.publish()
        elif not writer.has_ended:
            emit(Progress("opening the model"))
            _import(read(path), Coming(name=name, path=path, writer=writer, emit=emit), started)
    result = CheckpointReader(place.out_dir)
    return ImportResult(
        out_dir=place.named,
        format=name,
        layers=result.manifest.layers,
        average_bits=result.manifest.average_bits(),
        weight_bytes=result.weight_bytes(),
        seconds=time.perf_counter() - started,
    )


def _states(path: Path) -> Mapping[str, State]:
    """Return what changes whenever a model's files do, by their names."""
    return model_states(path) if path.is_dir() else {path.name: state_of(path)}


def _import(foreign: ForeignModel, coming: Coming, started: float) -> None:
    """Store what isn't stored yet, and give the result its name."""
    shapes, stray = _expected_shapes(foreign, coming.path)
    entries = _write_layers(foreign, shapes, coming)
    for full, load in foreign.others.items():
        if full in stray:
            _drop(full, load, coming.emit)
            continue
        coming.writer.once(full, partial(_plain, load))
    manifest = Manifest(
        tool_version=qtool.__version__,
        recipe={},
        layers=entries,
        digests=coming.writer.digests(),
    )
    _finish(foreign, manifest, coming, time.perf_counter() - started)


def _plain(load: Callable[[], Tensor]) -> Made:
    return Made(load())


def path_of(model: Location) -> Path:
    """Return the file or the directory of a model; a hub's model is downloaded."""
    return model.directory if model.path is None else model.path


def _unknown(path: Path) -> str:
    if path.is_dir():
        config = read_config(path)
        if config.get("quantization_config") is None:
            return f"{path} isn't quantized: there is nothing to import. Use it as it is."
        if foreign_method(config) is None:
            return f"{path} is a checkpoint of qtool already: use it as it is."
    known = [name for name in exchange_names() if load_exchange(name).read is not None]
    return f"{path} is in no format that qtool imports; these are {', '.join(known)}."


def _drop(full: str, load: Callable[[], Tensor], emit: Emit) -> None:
    """Leave out a bias that the model doesn't add: AutoGPTQ wrote one of zeros for every linear."""
    if bool(load().any()):
        emit(Notice(f"{full} is left out: the model that config.json describes has no such bias."))


def _expected_shapes(
    foreign: ForeignModel, path: Path
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the shape of each layer's weight in the model that transformers builds.

    And the names of biases of layers that have none there.

    Raises:
        CheckpointError: the model needs what isn't stored, or hasn't what is.
        ModelError: transformers can't build it.
    """
    skeleton = empty_model(parse_config(foreign.config, path), path)
    wanted = skeleton.state_dict(keep_vars=True)
    layers = {*foreign.layers, *foreign.tied}
    unknown = [name for name in layers if f"{name}.weight" not in wanted]
    if unknown:
        raise CheckpointError(
            f"{path}: {list_names(unknown)} is quantized there, and the model that config.json "
            "describes has no such layer."
        )
    there = {f"{name}.weight" for name in layers} | foreign.others.keys()
    values = {id(value) for name, value in wanted.items() if name in there}
    missing = [name for name, value in wanted.items() if id(value) not in values]
    if missing:
        raise CheckpointError(missing_message(missing, there - wanted.keys(), path))
    unknown = foreign.others.keys() - wanted.keys()
    stray = {f"{name}.bias" for name in layers} & unknown
    read = [name for name in sorted(unknown - stray) if not is_left_over(skeleton, name)]
    if read:  # such as AWQ's scales of activations
        raise CheckpointError(
            f"{path}: {list_names(read)} is stored, and the model that config.json describes has "
            "nothing of that name: whoever quantized it computes something else. Import another "
            "version of the model, or remove what nobody reads."
        )
    return {name: tuple(wanted[f"{name}.weight"].shape) for name in layers}, stray


def _write_layers(
    foreign: ForeignModel, shapes: Mapping[str, tuple[int, ...]], coming: Coming
) -> dict[str, LayerEntry]:
    """Read and write the quantized layers one by one; return what the manifest says of them."""
    entries = {}
    for number, (layer, load) in enumerate(foreign.layers.items(), start=1):
        notes = coming.writer.once(layer, partial(_loaded, layer, load, shapes[layer], coming.path))
        entries[layer] = LayerEntry(
            format=notes["format"],
            scheme=scheme_from_json(notes["scheme"]),
            shape=Shape2D(*notes["shape"]),
            method=coming.name,
            activation=foreign.activations.get(layer),
        )
        coming.emit(Progress(IMPORTING, number, len(foreign.layers), layer))
    shared = {
        head: replace(entries[table], shared_with=table) for head, table in foreign.tied.items()
    }
    return {**entries, **shared}


def _loaded(
    layer: str, load: Callable[[], QuantizedTensor], expected: tuple[int, ...], path: Path
) -> Made:
    """Read a layer; its weight must have the shape that the model has for it, or its transpose."""
    tensor = load()
    if sorted(tensor.shape) != sorted(expected):  # GPT-2 stores the transpose
        raise CheckpointError(
            f"{path}: {shown(layer)} has shape {tuple(tensor.shape)}, and config.json makes it "
            f"{expected}. config.json and weights don't belong together."
        )
    notes = {
        "format": tensor.format,
        "scheme": tensor.scheme.to_json(),
        "shape": list(tensor.shape),
    }
    return Made(tensor, notes)


def _finish(foreign: ForeignModel, manifest: Manifest, coming: Coming, seconds: float) -> None:
    """Write the files beside the weights, and give the result its name."""
    files = dict(foreign.files)
    if coming.path.is_dir():
        files = {**read_companions(coming.path), **files}
    report = {
        "version of qtool": qtool.__version__,
        "run": coming.writer.run_digest,
        "files": sorted({*files, REPORT_NAME, CONFIG_NAME}),
        "imported from": coming.name,
        "average_bits": manifest.average_bits(),
        "seconds": seconds,
        "versions": versions(),
        "layers": [],
    }
    files[REPORT_NAME] = (json_text(report) + "\n").encode()
    config = {key: value for key, value in foreign.config.items() if key != "_name_or_path"}
    coming.writer.finish(files, {**config, "quantization_config": manifest.to_config()})
