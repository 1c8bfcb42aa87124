"""Tune all quantized weights of the blocks, and the norms, by gradients through the whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from qtool.base import CausalModel, Notice, Progress, QuantizedTensor
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.experts import routes_tokens
from qtool.data.corpora import WRITTEN_BY_THE_MODEL
from qtool.modeling.load import load_source, load_tokenizer
from qtool.recipe.calibration import CalibrationSection, SourceSection
from qtool.recipe.tuning import EndToEndTuning
from qtool.scheme import ActivationScheme
from qtool.steps.draw_calibration import draw_for_tuning
from qtool.steps.halfway import Halfway
from qtool.steps.run import Run
from qtool.training.end_to_end import Course, Pair, best_rate, tune_end_to_end
from qtool.training.schedule import Point, Schedule
from qtool.training.student import (
    MEMORY_BOUND,
    fill_tables,
    free_vectors,
    make_student,
    quantize_inputs,
    recompute_blocks,
    stored_parts,
)
from qtool.wording import gigabytes

TRIED_RATES, TRIED_STEPS = (5e-4, 1.5e-3, 4.5e-3), 60
LEARNED_BYTES, LATENT_BYTES = 3, 16
"""Of a weight: its code, and as what it is multiplied; what a latent code takes with Adam."""
STEP_LOGIT_BYTES, STEP_ACTIVATION_BYTES = 8, 68
"""Of a token, per word, and per block and width: of both models, what the way back needs. Measured:
12.9 GB for 135M parameters and 8,192 tokens, where this says 13.4."""
MOST_DRAWN = 1 << 22
"""Tokens: then samples are seen again. The bundled texts have fewer; the model has to write."""
SELF_WRITTEN = 0.3
"""What `self_written: auto` is on a card."""
MODEL, HALFWAY, RATES = "tuned", "half-tuned", "rates"
"""Drafts: all that end-to-end tuning changes, how far it is, and which rates were tried, under the
name of the blocks."""


@dataclass(frozen=True, slots=True)
class SolvedModel:
    """All quantized weights of a model, by full name, on the device."""

    layers: Mapping[str, QuantizedTensor]
    """Of the blocks; they learn."""
    activations: Mapping[str, ActivationScheme | None]
    """How inputs of these layers are quantized; None: they aren't."""
    tables: Mapping[str, QuantizedTensor]
    """Embedding and head; they stay."""


def tune_model_once(
    run: Run, section: EndToEndTuning, writer: CheckpointWriter, solved: SolvedModel
) -> dict[str, Tensor]:
    """Tune a model whose layers are all there, unless an earlier run did.

    Args:
        run: Which model and samples, and where it is computed.
        section: How long and how fast.
        writer: Takes what is tuned.
        solved: Where tuning starts.

    Returns:
        Parts of the layers, and norms and biases, by full name.
    """
    name = run.source.adapter.blocks
    writer.once(name, partial(_tuned, run, section, writer, solved), draft=MODEL)
    return writer.tensors(name, draft=MODEL)


def _tuned(
    run: Run, section: EndToEndTuning, writer: CheckpointWriter, solved: SolvedModel
) -> Made:
    env = run.env
    env.emit(Progress("loading the original"))
    original = load_source(run.source, env.device)
    pair, vectors = pair_of(run, section, original, solved)
    course = Course(*_batches(run, section))
    env.emit(_announced(original, solved.layers, course.batches[0], section))

    def report(point: Point) -> None:
        detail = f"KL {point.held_out:.4f} on held-out samples"
        env.emit(Progress("tune end to end", point.step, section.steps, detail))

    schedule = Schedule(
        steps=section.steps,
        learning_rate=_rate(run, section, writer, pair, course),
        code_rate=section.code_rate,
        code_share=section.code_share,
        check_every=max(1, section.steps // 10),
    )
    memory = Halfway(writer, run.source.adapter.blocks, HALFWAY)
    points = tune_end_to_end(pair, course, schedule, report, memory, env.parts)
    if min(point.held_out for point in points) == points[0].held_out:
        env.emit(Notice(_no_gain(points, schedule)))
    tensors = dict(stored_parts(pair.student))
    for name, vector in vectors.items():
        tensors[name] = vector.detach().to(run.source.read(name).dtype)
    return Made(tensors, {"curve": [asdict(point) for point in points]})


def pair_of(
    run: Run, section: EndToEndTuning, original: CausalModel, solved: SolvedModel
) -> tuple[Pair, dict[str, torch.nn.Parameter]]:
    """Return the student with its original, and its norms and biases that learn."""
    student = make_student(original, solved.layers, moves_codes=section.code_rate > 0)
    quantize_inputs(student, solved.activations)
    fill_tables(student, solved.tables)
    large = original.num_parameters() >= MEMORY_BOUND
    if section.recompute is True or (section.recompute == "auto" and large):
        recompute_blocks(student, run.source.adapter.blocks)
    vectors = free_vectors(student, run.plan.kept if section.norms else ())
    on_card = torch.device(run.env.device).type == "cuda"
    dtype = torch.bfloat16 if on_card else None
    captured = on_card and not large and not routes_tokens(student)
    pair = Pair(student, original, list(vectors.values()), dtype, captured=captured)
    return pair, vectors


def _rate(
    run: Run, section: EndToEndTuning, writer: CheckpointWriter, pair: Pair, course: Course
) -> float:
    """Return the learning rate of a recipe; or the best of a few, that an earlier run may know."""
    if section.learning_rate != "auto":
        return section.learning_rate
    schedule = Schedule(
        steps=TRIED_STEPS, learning_rate=0.0, code_rate=section.code_rate, check_every=TRIED_STEPS
    )

    def tried() -> Made:
        run.env.emit(Progress(f"trying {len(TRIED_RATES)} learning rates"))
        found = best_rate(pair, course, schedule, TRIED_RATES, run.env.parts)
        return Made({}, {"tried": [[rate, loss] for rate, loss in found.items()]})

    notes = writer.once(run.source.adapter.blocks, tried, draft=RATES)
    rate, loss = notes["tried"][0]
    run.env.emit(Progress(f"learning rate {rate:g}: KL {loss:.4f} after {TRIED_STEPS} steps"))
    return float(rate)


def _announced(
    original: CausalModel,
    layers: Mapping[str, QuantizedTensor],
    batch: Tensor,
    section: EndToEndTuning,
) -> Progress:
    """Return how many steps are to come, and about how much memory one takes, with both models."""
    weights = sum(prod(layer.shape) for layer in layers.values())
    model = sum(value.numel() * value.element_size() for value in original.parameters())
    text = original.config.get_text_config()
    width, blocks, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    per_weight = LEARNED_BYTES + (LATENT_BYTES if section.code_rate > 0 else 0)
    per_token = STEP_LOGIT_BYTES * vocabulary + STEP_ACTIVATION_BYTES * width * blocks
    needed = gigabytes(model + weights * per_weight + batch.numel() * per_token)
    return Progress(f"tuning {section.steps} steps, about {needed} of memory")


def _no_gain(points: Sequence[Point], schedule: Schedule) -> str:
    return (
        f"End-to-end tuning gained nothing: KL on held-out samples was {points[0].held_out:.4f} "
        f"and came to {points[-1].held_out:.4f}. The result is as it was before. Lower "
        f"tuning.end_to_end.learning_rate, {schedule.learning_rate:g} now, or use more texts."
    )


def _batches(run: Run, section: EndToEndTuning) -> tuple[list[Tensor], list[Tensor]]:
    """Return what is learned from, in full batches, and what it is judged by.

    Samples of the mixture are drawn for it: there can be many, and all are seen before one is seen
    again. Of other texts there are only those that the layers were solved with, cut to the length.
    """
    calibration, asked = run.calibration, run.recipe.calibration
    assert calibration is not None and asked is not None
    length = min(section.sequence_length, run.source.num_positions or section.sequence_length)
    if asked.dataset is None and not run.samples_given:
        run.env.emit(Progress("drawing data to tune on"))
        samples, held_out = draw_for_tuning(
            with_own_texts(asked, section, run.env.device),
            run.source,
            load_tokenizer(run.source.directory),
            lengths=[length] * min(section.steps * section.batch_size, MOST_DRAWN // length),
            seed=run.recipe.seed,
            emit=run.env.emit,
        )
    else:
        if section.self_written not in ("auto", 0):
            message = "tuning.end_to_end.self_written isn't read: the samples were drawn before."
            run.env.emit(Notice(message))
        parts = calibration.split(asked.holdout)
        samples, held_out = (_cut(part.samples, length, run.recipe.seed) for part in parts)
    rows = torch.stack(samples).split(section.batch_size)
    full = [batch for batch in rows if len(batch) == len(rows[0])]
    return full, list(torch.stack(held_out).split(section.batch_size))


def with_own_texts(
    asked: CalibrationSection, section: EndToEndTuning, device: str
) -> CalibrationSection:
    """Add what the original writes itself to a mixture, as the recipe says, if it isn't there."""
    on_card = torch.device(device).type == "cuda"
    share = section.self_written
    if share == "auto":
        share = SELF_WRITTEN if on_card else 0.0
    if share == 0 or any(one.dataset == WRITTEN_BY_THE_MODEL for one in asked.sources):
        return asked
    given = [one.model_copy(update={"share": one.share * (1 - share)}) for one in asked.sources]
    own = SourceSection(dataset=WRITTEN_BY_THE_MODEL, share=share)
    return asked.model_copy(update={"mixture": (*given, own)})


def _cut(samples: Sequence[Tensor], length: int, seed: int) -> list[Tensor]:
    """Cut samples into pieces of one length, in random order; of short ones the longest length."""
    length = min(length, max(map(len, samples)))
    pieces = [piece for sample in samples for piece in sample.split(length)]
    pieces = [piece for piece in pieces if len(piece) == length]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[index] for index in order]
