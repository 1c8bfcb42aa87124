"""`qtool adapt`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.base import Emit
from qtool.cli import console, early
from qtool.cli.options import (
    DeviceOption,
    JsonOption,
    check_targets,
    given_options,
    wrong_plot_name,
)
from qtool.cli.progress import progress
from qtool.cli.settings_of import parsed_settings
from qtool.cli.tables.next_steps import print_next
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
from qtool.storage.jsonl import check_file
from qtool.wording import gigabytes

if TYPE_CHECKING:
    from qtool.modeling.locate import Location
    from qtool.pipeline.adapt import AdaptResult

KEPT_SO_FAR = "What was learned is kept: the same command with --resume goes on."


def adapt(
    context: typer.Context,
    out_dir: Annotated[str, typer.Argument(help="Checkpoint that qtool has quantized.")],
    data: Annotated[
        Path, typer.Argument(help="JSON lines to learn from; with --merge an adapter.")
    ],
    adapter_dir: Annotated[
        Path, typer.Argument(help="Directory for the adapter; with --merge for a checkpoint.")
    ],
    method: Annotated[str, typer.Option(help="alpha, lora or ra-lora.")] = "alpha",
    merge: Annotated[
        bool, typer.Option("--merge", help="Write OUT_DIR with the adapter DATA in it instead.")
    ] = False,
    validation: ValidationOption = None,
    original: Annotated[
        str | None,
        typer.Option(help="What was quantized, for ra-lora; default: the source, if it is public."),
    ] = None,
    epochs: EpochsOption = 3.0,
    batch_size: BatchOption = 16,
    learning_rate: Annotated[
        float | None, of_training(min=0, help="At its highest; default: by method.")
    ] = None,
    weight_decay: Annotated[float, of_training(min=0, help="Pulls to the base.")] = 0.0,
    warmup: WarmupOption = 0.05,
    label_smoothing: Annotated[float, of_training(min=0, max=0.5, help="Of labels.")] = 0.0,
    max_length: LineLengthOption = 512,
    patience: Annotated[
        int | None,
        of_training(metavar="N", min=1, help="End after N looks without a gain; 20 are taken."),
    ] = None,
    packing: Annotated[
        bool,
        of_training("--packing", help="Several lines in a row of a batch, unseen by each other."),
    ] = False,
    recompute: Annotated[
        bool,
        of_training("--recompute", help="Keep less for the way back; large models always do."),
    ] = False,
    seed: LineOrderOption = 0,
    targets: Annotated[
        str | None, of_training(help="Linears, as globs with commas between; default: all.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        of_training("--set", metavar="KEY=VALUE", help="Option of the method; can be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace ADAPTER_DIR.")] = False,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    json_file: JsonOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the loss on held-out lines: .png or .svg.")
    ] = None,
) -> None:
    """Adapt a checkpoint to a task: planes stay, an adapter of a few numbers is trained.

    [bold]Examples[/bold]

      qtool adapt OUT_DIR chats.jsonl my-adapter

      qtool adapt OUT_DIR pairs.jsonl my-adapter --method ra-lora --set rank=16

      qtool adapt OUT_DIR my-adapter MERGED_DIR --merge
    """
    check_targets([json_file, plot])
    if wrong := wrong_plot_name(plot):
        raise typer.BadParameter(wrong[0], ctx=context)
    if merge:
        _check_merging(context)
        early.check_adapter(data)
    else:
        _check_lines(data, validation)
    with (
        progress(KEPT_SO_FAR) as emit,
        early.opened([out_dir, original], device, emit) as (
            where,
            before,
        ),
    ):
        if merge:
            values, line = _merge(where, data, adapter_dir, emit, overwrite=overwrite)
        else:
            from qtool.pipeline.adapt import AdaptRequest, adapt
            from qtool.steps.adapt_model import AdaptOptions

            options = AdaptOptions(
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                warmup_share=warmup,
                label_smoothing=label_smoothing,
                max_length=max_length,
                patience=patience,
                packing=packing,
                recompute=recompute,
                seed=seed,
                targets=tuple((targets or "*").split(",")),
                kind_options=parsed_settings(settings or []),
            )
            request = AdaptRequest(
                model=where,
                data=data,
                directory=adapter_dir,
                kind=method,
                validation=validation,
                original=before,
                options=options,
                overwrite=overwrite,
                resume=resume,
            )
            from qtool.report.curves import draw_curves, read_curves
            from qtool.report.roofline import check_plot

            if plot is not None:
                check_plot(plot)
            values, line = _report(adapt(request, emit=emit))
            if plot is not None:
                draw_curves(plot, read_curves(adapter_dir / "curve.jsonl"))
    if console.write_json(values, json_file):
        console.out.print(line, markup=False, soft_wrap=True)
        used = (adapter_dir,) if merge else (out_dir, "--adapter", adapter_dir)
        print_next(("eval", *used), ("chat", *used))


def _check_lines(data: Path, validation: Path | None) -> None:
    files = list(filter(None, (data, validation)))
    for file in files:
        check_file(file)
    from qtool.data.exercises import check_exercises  # torch: slow

    for file in files:
        check_exercises(file)


def _check_merging(context: typer.Context) -> None:
    """Refuse options that would do nothing."""
    meant = {"out_dir", "data", "adapter_dir", "merge", "overwrite", "device", "json_file"}
    useless = [one.opts[0] for one in given_options(context) if one.name not in meant]
    if useless:
        raise typer.BadParameter(f"{', '.join(useless)}: --merge trains nothing.", ctx=context)


def _merge(
    model: "Location", adapter: Path, out_dir: Path, emit: Emit, *, overwrite: bool
) -> tuple[dict[str, Any], str]:
    from qtool.pipeline.merge_adapter import merge_adapter

    done = merge_adapter(model, adapter, out_dir, overwrite=overwrite, emit=emit)
    values = {"out_dir": str(done.out_dir), "layers": done.changed, "lost": done.lost}
    how = "exact" if done.lost is None else f"{done.lost:.0%} of the change is lost"
    return values, f"{done.out_dir}: {done.changed} layers have the adapter in them, {how}."


def _report(done: "AdaptResult") -> tuple[dict[str, Any], str]:
    values = {
        "adapter_dir": str(done.directory),
        "method": done.kind,
        "trainable_parameters": done.num_parameters,
        "adapter_bytes": done.num_bytes,
        "loss_before": done.first_loss,
        "loss": done.best_loss,
        "steps": done.steps,
        "tokens_per_second": done.tokens_per_second,
        "seconds": done.seconds,
        **done.notes,
    }
    line = (
        f"{done.directory}: {done.num_parameters:,} numbers learned ({gigabytes(done.num_bytes)}), "
        f"held-out loss {done.first_loss:.4f} -> {done.best_loss:.4f} in {done.steps} steps, "
        f"{done.seconds:,.0f} s."
    )
    return values, line
