"""`train` by a recipe that writes a dense model: what other recipes take as their original."""

import contextlib
import time
from pathlib import Path

import torch

from qtool.base import CausalModel, Emit
from qtool.checkpoint.fresh import made_fresh
from qtool.checkpoint.marks import paths_below
from qtool.checkpoint.place import file_failures
from qtool.errors import ModelError, RecipeError
from qtool.modeling.classifiers import is_encoder, load_encoder
from qtool.modeling.companions import read_companions
from qtool.modeling.config import read_config
from qtool.modeling.device import default_device
from qtool.modeling.encoders import encoder_adapter
from qtool.modeling.load import load_tokenizer
from qtool.pipeline.learned_data import class_lessons, read_classes
from qtool.pipeline.train_request import TrainRequest, TrainResult
from qtool.plugins import PluginOptions
from qtool.steps.train_model import train_stages
from qtool.storage.tensor_failures import numbered_failures
from qtool.storage.whole_files import sync
from qtool.training.classified import class_scores
from qtool.training.recipes import Trainee, Training
from qtool.training.together import is_first


def train_dense(
    kind: Training, own: PluginOptions, request: TrainRequest, emit: Emit
) -> TrainResult:
    """Let an encoder learn labels.

    Raises:
        RecipeError: it is to go on where a run was stopped: such a run keeps nothing.
        ModelError: the model is no encoder of a known family, or is quantized.
        OutputError: something is at OUT_DIR: known before anything is learned.
    """
    directory, begun = request.model.directory, time.perf_counter()
    if request.resume:
        raise RecipeError(f"{request.recipe} keeps nothing halfway. Leave out --resume.")
    if not is_encoder(directory) or "quantization_config" in read_config(directory):
        raise ModelError(
            f"{directory} is no dense encoder that qtool knows, such as BERT or MiniLM. Give one."
        )
    with made_fresh(request.out_dir) if is_first() else contextlib.nullcontext() as made:
        trainee = _trainee_of(kind, request, emit)
        prepared = kind.prepare(trainee, own)
        looks = trainee.lessons.held_out
        before = class_scores(trainee.original, looks)
        done = train_stages(prepared, lambda _stage: None, emit)
        after = class_scores(trainee.original, looks)
        if made is not None:
            _save(trainee.original, directory, made, request.out_dir)
    return TrainResult(
        out_dir=request.out_dir,
        recipe=request.recipe,
        first_loss=done.first.held_out,
        best_loss=min(point.held_out for point in done.last),
        steps=done.last[-1].step,
        seconds=time.perf_counter() - begun,
        scores={"before": before, "after": after},
    )


def _trainee_of(kind: Training, request: TrainRequest, emit: Emit) -> Trainee:
    directory, options, device = request.model.directory, request.options, default_device()
    known = _num_classes(directory)
    rows = read_classes(request.data, request.validation, known, options.seed)
    classes = known or max(row.label for some in rows for row in some) + 1
    torch.manual_seed(options.seed)  # of a head that isn't stored
    model = load_encoder(directory, device, classes)
    lessons = class_lessons(rows, load_tokenizer(directory), model, options).on(device)
    adapter = encoder_adapter({**model.config.to_dict(), "architectures": [type(model).__name__]})
    assert adapter is not None
    return options.trainee(kind, model, lessons, adapter, emit)


def _num_classes(directory: Path) -> int | None:
    """Return how many classes a model tells apart; None: it has no head yet."""
    config = read_config(directory)
    if encoder_adapter(config) is None:
        return None
    return len(config.get("id2label") or ()) or 2


def _save(model: CausalModel, source: Path, made: Path, out_dir: Path) -> None:
    """Write a dense model with the small files of what it comes of."""
    with file_failures(out_dir), numbered_failures():
        model.save_pretrained(made)
        for name, content in read_companions(source).items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(content)
        for path in paths_below(made):
            sync(made / path)
