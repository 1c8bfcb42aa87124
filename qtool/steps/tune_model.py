"""Tune all quantized weights of the blocks, and the norms, by gradients through the whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from qtool.base import CausalModel, Notice, Progress, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.writer import CheckpointWriter, Made
from qtool.modeling.load import load_original, load_tokenizer
from qtool.recipe.tuning import EndToEndTuning
from qtool.steps.draw_calibration import draw_for_tuning
from qtool.steps.run import Run
from qtool.training.descent import Point, Schedule
from qtool.training.end_to_end import Pair, tune_end_to_end
from qtool.training.student import free_vectors, make_student, stored_parts

SMALL = 1_000_000_000
"""Parameters; a step of fewer is bound by its launches, and is captured."""
MODEL = "tuned"
"""Draft: all that end-to-end tuning changes, under the name of the list of blocks."""


def tune_model_once(
    run: Run,
    section: EndToEndTuning,
    writer: CheckpointWriter,
    layers: Mapping[str, QuantizedTensor],
    tables: Mapping[str, QuantizedTensor],
) -> dict[str, Tensor]:
    """Tune a model whose layers are all there, unless an earlier run did.

    Args:
        run: Which model and samples, and where it is computed.
        section: How long and how fast.
        writer: Takes what is tuned.
        layers: Of the blocks, on the device; they learn.
        tables: Quantized embedding and head; they stay.

    Returns:
        Parts of the layers, and norms and biases, by full name.
    """
    name = run.source.adapter.blocks
    writer.once(name, partial(_tuned, run, section, layers, tables), draft=MODEL)
    return writer.tensors(name, draft=MODEL)


def _tuned(
    run: Run,
    section: EndToEndTuning,
    layers: Mapping[str, QuantizedTensor],
    tables: Mapping[str, QuantizedTensor],
) -> Made:
    env = run.env
    env.emit(Progress("loading the original"))
    on_card = torch.device(env.device).type == "cuda"
    original = load_original(run.source.directory, env.device)
    student = make_student(original, layers, moves_codes=section.code_rate > 0)
    _fill_tables(student, tables)
    vectors = free_vectors(student, run.plan.kept if section.norms else ())
    batches, held_out = _batches(run, section)
    schedule = Schedule(
        steps=section.steps,
        learning_rate=section.learning_rate,
        code_rate=section.code_rate,
        check_every=max(1, section.steps // 10),
    )

    def report(point: Point) -> None:
        detail = f"KL {point.held_out:.4f} on held-out samples"
        env.emit(Progress("tune end to end", point.step, section.steps, detail))

    pair = Pair(
        student,
        original,
        list(vectors.values()),
        torch.bfloat16 if on_card else None,
        captured=on_card and original.num_parameters() < SMALL,
    )
    points = tune_end_to_end(pair, batches, held_out, schedule, report)
    if min(point.held_out for point in points) == points[0].held_out:
        env.emit(Notice(_no_gain(points, section)))
    tensors = dict(stored_parts(student))
    for name, vector in vectors.items():
        tensors[name] = vector.detach().to(run.source.read(name).dtype)
    return Made(tensors, {"curve": [asdict(point) for point in points]})


def _no_gain(points: Sequence[Point], section: EndToEndTuning) -> str:
    return (
        f"End-to-end tuning gained nothing: KL on held-out samples was {points[0].held_out:.4f} "
        f"and came to {points[-1].held_out:.4f}. The result is as it was before. Lower "
        f"tuning.end_to_end.learning_rate, {section.learning_rate:g} now, or use more texts."
    )


def _fill_tables(student: CausalModel, tables: Mapping[str, QuantizedTensor]) -> None:
    """Give the student the quantized embedding and head, as dense weights of its own."""
    for name, tensor in tables.items():
        module = student.get_submodule(name)
        values = codec(tensor.format).dequantize(tensor, torch.float32).to(module.weight)
        was = module.weight
        for other in student.modules():  # a tied head has the same parameter
            if getattr(other, "weight", None) is was:
                other.weight = torch.nn.Parameter(values, requires_grad=False)


def _batches(run: Run, section: EndToEndTuning) -> tuple[list[Tensor], list[Tensor]]:
    """Return what is learned from, in full batches, and what it is judged by.

    Samples of the mixture are drawn for it: there can be many. Of other texts there are only those
    that the layers were solved with, cut to the length.
    """
    calibration, asked = run.calibration, run.recipe.calibration
    assert calibration is not None and asked is not None
    length = min(section.sequence_length, run.source.num_positions or section.sequence_length)
    if asked.dataset is None and not run.samples_given:
        run.env.emit(Progress("drawing data to tune on"))
        samples, held_out = draw_for_tuning(
            asked,
            run.source,
            load_tokenizer(run.source.directory),
            lengths=[length] * (section.steps * section.batch_size),
            seed=run.recipe.seed,
            emit=run.env.emit,
        )
    else:
        parts = calibration.split(asked.holdout)
        samples, held_out = (_cut(part.samples, length, run.recipe.seed) for part in parts)
    rows = torch.stack(samples).split(section.batch_size)
    full = [batch for batch in rows if len(batch) == len(rows[0])]
    return full, list(torch.stack(held_out).split(section.batch_size))


def _cut(samples: Sequence[Tensor], length: int, seed: int) -> list[Tensor]:
    """Cut samples into pieces of one length, in random order; of short ones the longest length."""
    length = min(length, max(map(len, samples)))
    pieces = [piece for sample in samples for piece in sample.split(length)]
    pieces = [piece for piece in pieces if len(piece) == length]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[index] for index in order]
