"""`train` by a recipe with a section `training`: a dense model is quantized first."""

from dataclasses import replace

from torch import distributed

from qtool.base import Emit, Notice, ignore_events
from qtool.checkpoint.claim import look
from qtool.checkpoint.place import find_place
from qtool.errors import RecipeError
from qtool.modeling.classifiers import is_encoder
from qtool.modeling.config import read_config
from qtool.modeling.locate import Location
from qtool.pipeline.quantize import quantize
from qtool.pipeline.train import train
from qtool.pipeline.train_request import TrainRequest, TrainResult
from qtool.recipe.schema import Recipe
from qtool.training.recipes import load_training
from qtool.training.together import fellows, is_first, meeting

QUANTIZED_BESIDE = ".quantized"
"""What the name of the checkpoint that training begins at adds to OUT_DIR."""


def quantize_and_train(
    recipe: Recipe, request: TrainRequest, *, emit: Emit = ignore_events
) -> TrainResult:
    """Quantize a dense model by a recipe, into OUT_DIR.quantized, and train that.

    A checkpoint of qtool is trained as it is. Options of the request go before the recipe's.

    Raises:
        RecipeError: the recipe has no section `training`, or it says what can't be.
        QtoolError: as `quantize` and `train`.
    """
    section = recipe.training
    if section is None:
        raise RecipeError(
            "The recipe has no section `training`, so it is one for `qtool quantize`. Add "
            "`training: {name: teacher-intervention}`, or extend train-w2-teacher-intervention."
        )
    own = {**section.options, **request.options.kind_options}
    asked = request.options.learning_rate
    rate = section.learning_rate if asked is None else asked
    options = replace(request.options, kind_options=own, learning_rate=rate)
    request = replace(request, recipe=section.name, options=options)
    options.checked(load_training(section.name))
    with meeting():
        return train(_quantized(recipe, request, emit), emit=emit)


def _quantized(recipe: Recipe, request: TrainRequest, emit: Emit) -> TrainRequest:
    """Return the request with a checkpoint in the place of a dense model."""
    if is_first():
        look(find_place(request.out_dir, overwrite=request.overwrite, resume=request.resume))
    directory = request.model.directory
    if "quantization_config" in read_config(directory):
        return request
    base = request.out_dir.with_name(request.out_dir.name + QUANTIZED_BESIDE)
    if is_encoder(directory) and recipe.calibration is not None:
        recipe = recipe.model_copy(update={"calibration": None})
        if is_first():
            emit(Notice("Encoders write no texts to calibrate on: it is quantized without data."))
    if is_first():
        quantize(
            request.model,
            base,
            recipe,
            overwrite=request.overwrite,
            resume=request.resume,
            emit=emit,
        )
    if fellows() > 1:
        distributed.barrier()
    return replace(request, model=Location(base), original=request.original or request.model)
