"""What a run takes beside its blocks, measured on a part: tables, copying, end-to-end tuning."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from qtool.checkpoint.writer import CheckpointWriter
from qtool.modeling.load import load_source
from qtool.scheme import Shape2D
from qtool.steps.draw_calibration import HELD_OUT
from qtool.steps.measure_blocks import kind_of
from qtool.steps.plan import LayerPlan, original_bytes
from qtool.steps.run import Run
from qtool.steps.solve import LayerResult, copied
from qtool.steps.solve_table import solve_alone
from qtool.steps.tune_blocks import draft_of
from qtool.steps.tune_model import TRIED_RATES, TRIED_STEPS, SolvedModel, pair_of
from qtool.steps.usage import NO_USE, Meter, Usage
from qtool.training.descent import Stepper
from qtool.training.end_to_end import REFINED_BY, Course
from qtool.training.schedule import Schedule

COPY, LOAD, FIRST_STEP, STEP, LOOK = "copy", "load", "first step", "step", "look"
STEPS_TAKEN = 8
"""Of end-to-end tuning, the first half to warm up: on a card a graph is captured in it."""
LOOKS_TAKEN = 10
"""At the held-out samples, beside the first."""
MOST_WEIGHTS = 2**24
"""Of a table are solved; the others take as long."""


def time_tables(run: Run, meter: Meter) -> dict[str, float]:
    """Solve the first rows of embedding and head, without data.

    Returns:
        Of each table, by `kind_of`, how many times that is the whole.
    """
    times = {}
    for layer in run.plan.layers:
        if layer.role == "block":
            continue
        rows = _rows(layer)
        kind = kind_of(run.source, layer)
        times[kind] = layer.shape.out_features / rows
        part = replace(layer, shape=Shape2D(rows, layer.shape.in_features), row_bits=b"")
        if layer.scheme.rows:
            part = part.uniform(layer.scheme.num_bits)
        with meter.measuring(kind):
            weight = run.source.read_weight(layer.name)[:rows].to(run.env.device)
            solve_alone(part, weight, run.env)
    return times


def _rows(layer: LayerPlan) -> int:
    """Return how many rows are solved: whole groups, if these lie along them."""
    whole = layer.scheme.group_dim == "out_features"
    few = max(1, MOST_WEIGHTS // layer.shape.in_features)
    return layer.shape.out_features if whole else min(layer.shape.out_features, few)


def measure_copying(run: Run, writer: CheckpointWriter, meter: Meter) -> int:
    """Copy the largest tensor that stays as it is; return its bytes, 0 if there is none."""
    sizes = {name: original_bytes(run.source, name) for name in run.plan.kept}
    if not sizes:
        return 0
    name = max(sizes, key=sizes.__getitem__)
    with meter.measuring(COPY):
        writer.once(name, lambda: copied(run, name))
    return sizes[name]


def measure_end_to_end(
    run: Run, writer: CheckpointWriter, solved: Mapping[str, LayerResult], meter: Meter
) -> None:
    """Take a few steps of end-to-end tuning, and look at the held-out samples once.

    Args:
        run: The whole run, with samples.
        writer: Has the solved layers that stand in for all.
        solved: These, by `kind_of`.
        meter: Gets `LOAD`, `STEP` and `LOOK`.
    """
    section, env = run.recipe.tuning.end_to_end, run.env
    if section is None or run.calibration is None:
        return
    layers, activations = {}, {}
    for layer in run.plan.in_blocks:
        stand_in = solved.get(kind_of(run.source, layer))
        if stand_in is not None:
            entry = stand_in.entry
            layers[layer.name] = draft_of(writer, stand_in.name, entry, env.device)
            activations[layer.name] = entry.activation
    with meter.measuring(LOAD):
        original = load_source(run.source, env.device)
        pair, _ = pair_of(run, section, original, SolvedModel(layers, activations, {}))
    length = min(section.sequence_length, run.source.num_positions or section.sequence_length)
    tokens = torch.cat(run.calibration.samples)
    count = section.batch_size * length
    batch = tokens.repeat(-(-count // len(tokens)))[:count].view(-1, length)
    learning = Course([batch], [batch]).learning(pair, 0.0, env.parts)
    stepper = Stepper(learning, Schedule(steps=STEPS_TAKEN, learning_rate=1e-3))
    learning.feed(0)
    for number in range(STEPS_TAKEN):
        with meter.measuring(STEP if number >= STEPS_TAKEN // 2 else FIRST_STEP):
            stepper.step(1.0)
    with meter.measuring(LOOK):
        learning.held_out()


def end_to_end_costs(run: Run, meter: Meter) -> Usage:
    """Return what end-to-end tuning takes, from what was measured of it."""
    section = run.recipe.tuning.end_to_end
    if section is None:
        return NO_USE
    looks = min(section.steps, LOOKS_TAKEN) + 1
    batches = max(1, HELD_OUT // section.batch_size)
    steps = section.steps + (REFINED_BY * looks if section.code_share > 0 else 0)
    if section.learning_rate == "auto":
        steps += len(TRIED_RATES) * TRIED_STEPS
        looks += 2 * len(TRIED_RATES)
    found = meter.mean(LOAD) + meter.mean(FIRST_STEP) + meter.mean(STEP) * steps
    return found + meter.mean(LOOK) * (looks * batches)
