"""`train`: a checkpoint learns, by a training recipe, to follow its original."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

import qtool
from qtool.base import CausalModel, Emit, Notice, QuantizedTensor, ignore_events
from qtool.checkpoint.apart import check_apart
from qtool.checkpoint.claim import look
from qtool.checkpoint.marks import read_report
from qtool.checkpoint.place import Place, find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import ModelError, RecipeError
from qtool.modeling.classifiers import is_encoder
from qtool.modeling.config import read_config
from qtool.modeling.device import default_device
from qtool.modeling.digest import model_digest
from qtool.modeling.load import LoadedModel, load_source, load_tokenizer
from qtool.modeling.locate import locate
from qtool.modeling.source import ModelSource, open_source
from qtool.pipeline.learned_data import class_lessons, read_classes, read_curriculum
from qtool.pipeline.rewritten import rewrite
from qtool.pipeline.train_dense import train_dense
from qtool.pipeline.train_request import TrainRequest, TrainResult
from qtool.steps.halfway import Halfway
from qtool.steps.memory import failures_of_the_machine
from qtool.steps.train_model import StagesDone, TrainOptions, train_stages
from qtool.storage.digests import files_digest
from qtool.training.classified import class_scores
from qtool.training.lessons import Lessons, causal_lessons
from qtool.training.recipes import PreparedTraining, Trainee, Training, load_training
from qtool.training.together import agreed, fellows, is_first, meeting

WRITING_TRAINED = "writing what was learned"
ABOUT = "trained"
"""What has the result of training, in a report."""


def train(request: TrainRequest, *, emit: Emit = ignore_events) -> TrainResult:
    """Train a checkpoint by a recipe, and write the result as a checkpoint.

    A recipe that writes dense models begins at one.

    Raises:
        OutputError: before anything is read: the place isn't free.
        DataError: the data can't be read, teach nothing, or have labels that are none.
        ModelError: the model isn't a checkpoint of qtool, or nobody knows its original.
        QtoolError: the recipe doesn't go on it.
    """
    with meeting():
        _check_batch(request.options)
        return _train(request, emit if is_first() else ignore_events)


def _train(request: TrainRequest, emit: Emit) -> TrainResult:
    kind = load_training(request.recipe)
    own = request.options.checked(kind)
    files = [request.data, *filter(None, [request.validation])]
    place = find_place(request.out_dir, overwrite=request.overwrite, resume=request.resume)
    for read in filter(None, (request.model, request.original)):
        check_apart(place.out_dir, read.directory, files)
    if kind.is_dense:
        return train_dense(kind, own, request, emit)
    if is_first():
        look(place)
    reader = CheckpointReader(request.model.directory)
    source = _original(request, reader)
    job = {
        "recipe": request.recipe,
        "base": model_digest(request.model.directory),
        "original": model_digest(source.directory),
        "data": files_digest(files),
        "options": asdict(request.options),
    }
    device = default_device()
    with _writing(place, job) as writer, failures_of_the_machine(str(device), place.out_dir):
        if _has_ended(writer):
            return _written(place)
        begun = time.perf_counter()
        trainee = _trainee(request, kind, reader, source, device, emit)
        prepared = kind.prepare(trainee, own)
        before = _scores(prepared, trainee.lessons)

        def memory(stage: str) -> Halfway | None:
            return None if writer is None else Halfway(writer, stage, "half-trained")

        done = train_stages(prepared, memory, emit)
        result = _result(request, prepared, trainee, done, before)
        result = replace(result, seconds=time.perf_counter() - begun)
        if done.last[0].held_out <= result.best_loss:
            emit(
                Notice("The last stage gained nothing. Try another --learning-rate, or more steps.")
            )
        if writer is not None:
            _write(reader, writer, prepared, result, emit)
    return result


def _writing(
    place: Place, job: dict[str, Any]
) -> contextlib.AbstractContextManager[CheckpointWriter | None]:
    """Return what writes; None in all processes that train together but the first."""
    if not is_first():
        return contextlib.nullcontext()
    return CheckpointWriter(place, {"train": job, "version of qtool": qtool.__version__})


def _has_ended(writer: CheckpointWriter | None) -> bool:
    """Return whether nothing is left to do, in all processes; what only lacks its name gets it.

    Args:
        writer: None in all processes that train together but the first.
    """
    if writer is not None and writer.is_sealed:
        writer.publish()
    ended = writer is not None and (writer.is_sealed or writer.has_ended)
    return bool(agreed(float(ended)))


def _written(place: Place) -> TrainResult:
    """Return what an earlier run has made."""
    return TrainResult(out_dir=place.named, **read_report(place.out_dir)[ABOUT])


def _check_batch(options: TrainOptions) -> None:
    if options.batch_size < fellows():
        raise RecipeError(
            f"{fellows()} processes can't share steps of {options.batch_size} lines. Give a "
            "--batch-size of at least one line for each."
        )


def _result(
    request: TrainRequest,
    prepared: PreparedTraining,
    trainee: Trainee,
    done: StagesDone,
    before: Mapping[str, Mapping[str, float]],
) -> TrainResult:
    after = _scores(prepared, trainee.lessons)
    scores = {}
    if after:
        whole = class_scores(trainee.original, trainee.lessons.held_out)
        scores = {"original": whole, "before": before["now"], "after": after["now"]}
    return TrainResult(
        out_dir=request.out_dir,
        recipe=request.recipe,
        first_loss=done.first.held_out,
        best_loss=min(point.held_out for point in done.last),
        steps=sum(points[-1].step for points in done.curves.values()),
        seconds=done.seconds,
        scores=scores,
        notes=prepared.notes(),
    )


def _scores(prepared: PreparedTraining, lessons: Lessons) -> dict[str, dict[str, float]]:
    """Return how well a classifier does now, by itself; nothing of a decoder."""
    if not lessons.held_out[0].classifies:
        return {}
    prepared.stages[-1].begin()
    return {"now": class_scores(prepared.student, lessons.held_out)}


def _original(request: TrainRequest, reader: CheckpointReader) -> ModelSource:
    """Return the model that was quantized.

    Raises:
        ModelError: nobody knows where it is, or it is another model.
    """
    location = request.original
    if location is None and reader.manifest.source is not None:
        location = locate(reader.manifest.source)
    if location is None:
        raise ModelError(
            f"{reader.directory} doesn't say what was quantized: its original was no public model. "
            "Give it with --original."
        )
    source = open_source(location)
    _check_same_model(reader, source)
    return source


def _check_same_model(reader: CheckpointReader, source: ModelSource) -> None:
    """Check that an original has the family and the sizes of a checkpoint.

    A student is made of the original's modules: of another model's it would be neither of the two.

    Raises:
        ModelError: it has others.
    """
    own, other = read_config(reader.directory), source.config
    sizes = [
        key
        for key, value in own.items()
        if type(value) is int and type(other.get(key)) is int and not key.endswith("_token_id")
    ]
    for key in ("model_type", *sizes):
        if own.get(key) != other.get(key):
            raise ModelError(
                f"{reader.directory} wasn't made of {source.directory}: {key} is {own.get(key)!r} "
                f"in its configuration, and {other.get(key)!r} in the other's. Give the model that "
                "was quantized with --original."
            )


def _trainee(
    request: TrainRequest,
    kind: Training,
    reader: CheckpointReader,
    source: ModelSource,
    device: torch.device,
    emit: Emit,
) -> Trainee:
    options = request.options
    original = load_source(source, str(device))
    lessons = _lessons(request, original, source, device, emit).on(device)
    layers, tables, kept = _stored(reader, source.adapter.blocks, device)
    begun = options.trainee(kind, original, lessons, source.adapter, emit)
    return replace(begun, layers=layers, tables=tables, kept=kept)


def _lessons(
    request: TrainRequest,
    original: CausalModel,
    source: ModelSource,
    device: torch.device,
    emit: Emit,
) -> Lessons:
    options, tokenizer = request.options, load_tokenizer(source.directory)
    if is_encoder(source.directory):
        classes = int(original.config.num_labels)
        rows = read_classes(request.data, request.validation, classes, options.seed)
        return class_lessons(rows, tokenizer, original, options)
    loaded = LoadedModel(
        source.directory.name, source.directory, original, tokenizer, device, original.dtype
    )
    curriculum = read_curriculum(request.data, request.validation, loaded, options, emit)
    return causal_lessons(curriculum)


def _stored(
    reader: CheckpointReader, blocks: str, device: torch.device
) -> tuple[dict[str, QuantizedTensor], dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Return the quantized layers of blocks, those beyond them, and all other tensors."""
    layers, tables = dict[str, QuantizedTensor](), dict[str, QuantizedTensor]()
    kept = dict[str, Tensor]()
    for name in reader.names():
        entry = reader.manifest.layers.get(name)
        if entry is not None and entry.shared_with is not None:
            continue
        value = reader.load(name)
        if isinstance(value, QuantizedTensor):
            parts = {part: tensor.to(device) for part, tensor in value.parts.items()}
            place = layers if name.startswith(f"{blocks}.") else tables
            place[name] = replace(value, parts=parts)
        else:
            kept[name] = value.to(device)
    return layers, tables, kept


def _write(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    prepared: PreparedTraining,
    result: TrainResult,
    emit: Emit,
) -> None:
    learned = prepared.results()

    def make(name: str, was: QuantizedTensor | Tensor) -> QuantizedTensor | Tensor:
        now = learned.get(name, was)
        if isinstance(now, QuantizedTensor):
            return replace(now, parts={part: each.cpu() for part, each in now.parts.items()})
        return now.cpu().to(was.dtype) if isinstance(was, Tensor) else now.cpu()

    about = {key: value for key, value in asdict(result).items() if key != "out_dir"}
    rewrite(reader, writer, make, {ABOUT: about}, emit, WRITING_TRAINED)
