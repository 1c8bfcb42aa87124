"""`qtool train`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli import console, early
from qtool.cli.options import DeviceOption, JsonOption, check_targets
from qtool.cli.progress import progress
from qtool.cli.settings_of import parsed_settings
from qtool.cli.tables.next_steps import print_next_of_checkpoint
from qtool.cli.training_options import (
    BatchOption,
    EpochsOption,
    LineLengthOption,
    LineOrderOption,
    ResumeOption,
    ValidationOption,
    WarmupOption,
    of_training,
)
from qtool.recipe.load import load_recipe
from qtool.recipe.names import built_in
from qtool.storage.jsonl import check_file

if TYPE_CHECKING:
    from qtool.pipeline.train_request import TrainResult


LOOK_KEPT = (
    "The same command with --resume goes on from the last look at held-out lines; `finetune` "
    "begins anew."
)


class Precision(StrEnum):
    """Choices of --precision, as `steps.train_model.TrainOptions`."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def train(
    model: Annotated[
        str, typer.Argument(help="What qtool has quantized; dense for recipes that quantize first.")
    ],
    data: Annotated[Path, typer.Argument(help="JSON lines to learn from.")],
    out_dir: Annotated[Path, typer.Argument(help="Directory for what was trained.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="distillation, teacher-intervention, flexor, pnr or finetune; or a recipe with "
            "a section 'training', which quantizes first: train-w2-pnr, mine.yaml."
        ),
    ] = "distillation",
    original: Annotated[
        str | None,
        typer.Option(help="What was quantized, and is followed; default: the source, if public."),
    ] = None,
    validation: ValidationOption = None,
    steps: Annotated[
        int | None, of_training(metavar="N", min=1, help="Default: as --epochs says.")
    ] = None,
    epochs: EpochsOption = 3.0,
    batch_size: BatchOption = 16,
    accumulate: Annotated[
        int, of_training(metavar="N", min=1, help="Learn from a batch in N parts: less memory.")
    ] = 1,
    learning_rate: Annotated[
        float | None, of_training(min=0, help="At its highest; default: by recipe.")
    ] = None,
    warmup: WarmupOption = 0.1,
    max_length: LineLengthOption = 512,
    recompute: Annotated[
        bool, of_training("--recompute", help="Keep less for the way back, and take longer.")
    ] = False,
    precision: Annotated[
        Precision, of_training(help="Of products; auto: bfloat16 on a card.")
    ] = Precision.AUTO,
    checks: Annotated[
        int, of_training(metavar="N", min=1, help="Looks at the held-out lines.")
    ] = 20,
    seed: LineOrderOption = 0,
    settings: Annotated[
        list[str] | None,
        of_training("--set", metavar="KEY=VALUE", help="Option of the recipe; can be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT_DIR.")] = False,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Train a checkpoint to follow its original: quantization-aware training.

    [bold]Examples[/bold]

      qtool train OUT_DIR texts.jsonl TRAINED_DIR --recipe teacher-intervention

      qtool train MODEL texts.jsonl TRAINED_DIR --recipe train-w2-teacher-intervention

      qtool train ENCODER labelled.jsonl DENSE_DIR --recipe finetune
    """
    check_targets([json_file])
    for file in filter(None, (data, validation)):
        check_file(file)
    with (
        progress(LOOK_KEPT) as emit,
        early.opened([model, original], device, emit) as (where, before),
    ):
        from qtool.pipeline.quantize_and_train import quantize_and_train
        from qtool.pipeline.train import train
        from qtool.pipeline.train_request import TrainRequest
        from qtool.steps.train_model import TrainOptions
        from qtool.training.together import is_first

        options = TrainOptions(
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup_share=warmup,
            max_length=max_length,
            recompute=recompute,
            precision=precision.value,
            checks=checks,
            seed=seed,
            kind_options=parsed_settings(settings or []),
        )
        request = TrainRequest(
            model=where,
            data=data,
            out_dir=out_dir,
            recipe=recipe,
            validation=validation,
            original=before,
            options=options,
            overwrite=overwrite,
            resume=resume,
        )
        if recipe.endswith((".yaml", ".yml")) or recipe in built_in():
            done = quantize_and_train(load_recipe(recipe), request, emit=emit)
        else:
            done = train(request, emit=emit)
        values, line = _report(done)
    if is_first() and console.write_json(values, json_file):
        console.out.print(line, markup=False, soft_wrap=True)
        print_next_of_checkpoint(out_dir, original)


def _report(done: "TrainResult") -> tuple[dict[str, Any], str]:
    values = {
        "out_dir": str(done.out_dir),
        "recipe": done.recipe,
        "loss_before": done.first_loss,
        "loss": done.best_loss,
        "steps": done.steps,
        "seconds": done.seconds,
        "scores": {name: dict(scores) for name, scores in done.scores.items()},
        **done.notes,
    }
    line = (
        f"{done.out_dir}: held-out loss {done.first_loss:.4f} -> {done.best_loss:.4f} in "
        f"{done.steps} steps, {done.seconds:,.0f} s."
    )
    for name, scores in done.scores.items():
        line += f" {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
    return values, line
