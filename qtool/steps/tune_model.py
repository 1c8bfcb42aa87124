"""Tune all quantized weights of the blocks, and the norms, by gradients through the whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from qtool.base import CausalModel, Progress, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.writer import CheckpointWriter, Made
from qtool.modeling.load import load_original
from qtool.recipe.schema import EndToEndTuning
from qtool.steps.run import Run
from qtool.training.descent import Point, Schedule
from qtool.training.end_to_end import tune_end_to_end
from qtool.training.student import free_vectors, learned_layers, make_student

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

    points = tune_end_to_end(
        student,
        original,
        list(vectors.values()),
        batches,
        held_out,
        schedule,
        report,
        autocast=torch.bfloat16 if on_card else None,
        captured=on_card and original.num_parameters() < SMALL,
    )
    tensors = {
        f"{name}.{part}": tensor
        for name, layer in learned_layers(student)
        for part, tensor in layer.stored().parts.items()
    }
    for name, vector in vectors.items():
        tensors[name] = vector.detach().to(run.source.read(name).dtype)
    return Made(tensors, {"curve": [asdict(point) for point in points]})


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
    """Cut the run's samples to the length of tuning, those held out for choices apart."""
    assert run.calibration is not None and run.recipe.calibration is not None
    train, held_out = run.calibration.split(run.recipe.calibration.holdout)
    length = section.sequence_length
    both = []
    for samples in (train.samples, held_out.samples):
        pieces = [piece for sample in samples for piece in sample.split(length)]
        rows = torch.stack([piece for piece in pieces if len(piece) == min(length, len(pieces[0]))])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.recipe.seed))
        both.append([b for b in rows[order].split(section.batch_size)])
    return both[0], both[1]
