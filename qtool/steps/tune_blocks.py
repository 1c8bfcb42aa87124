"""Tune the quantized weights of one block by gradients, where the walk stands."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from qtool.base import Progress, QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.experts import routes_tokens
from qtool.recipe.tuning import BlockTuning
from qtool.steps.run import Run
from qtool.training.blocks import Lesson, tune_block
from qtool.training.schedule import Schedule
from qtool.training.student import (
    install_layers,
    learned_layers,
    quantize_inputs,
    stored_parts,
)
from qtool.walk.filled_block import Block
from qtool.walk.solved import SolvedLinear
from qtool.walk.streams import Visit
from qtool.walk.walk import Walk

SOLVED, TUNED_BLOCK = "solved", "tuned"
"""Drafts: of a layer before gradients, and of all layers of a block after block tuning."""

MOST_OF_THEM = 0.75
"""Of the batches, have to be alike: the others aren't learned from then."""


def draft_of(
    writer: CheckpointWriter, name: str, entry: LayerEntry, device: str, *, block: str | None = None
) -> QuantizedTensor:
    """Return a layer as the solver left it, or, with the name of its block, as tuning left it."""
    draft = SOLVED if block is None else TUNED_BLOCK
    return writer.load(name, entry, device, draft=draft, within=block)


def tune_block_once(
    run: Run,
    section: BlockTuning,
    writer: CheckpointWriter,
    walk: Walk,
    block: str,
    entries: Mapping[str, LayerEntry],
) -> None:
    """Tune a block whose layers are all solved, unless an earlier run did.

    Args:
        run: Which model, and where it is computed.
        section: How long and how fast.
        writer: Has the solved layers, and takes those that are tuned.
        walk: Is told of the result.
        block: Its dotted name.
        entries: Of its layers.
    """
    device = run.env.device
    notes = writer.once(
        block, partial(tuned_block, run, section, writer, walk, block, entries), draft=TUNED_BLOCK
    )
    curve = notes["curve"]
    losses = [point["held_out"] for point in curve]
    detail = f"{block}  error {losses[0]:.2e} -> {min(losses):.2e}"
    run.env.emit(Progress("tune blocks", detail=detail))

    def weight(name: str, entry: LayerEntry) -> Tensor:
        tensor = draft_of(writer, name, entry, device, block=block)
        return codec(entry.format).dequantize(tensor, torch.float32)

    for name, entry in entries.items():
        walk.put(name, SolvedLinear(partial(weight, name, entry), entry.activation))


def tuned_block(
    run: Run,
    section: BlockTuning,
    writer: CheckpointWriter,
    walk: Walk,
    block: str,
    entries: Mapping[str, LayerEntry],
) -> Made:
    """Tune a block; arguments as of `tune_block_once`."""
    device = torch.device(run.env.device)
    visit = walk.visit(int(block.rpartition(".")[2]))
    streams = visit.streams
    targets = [visit.original.run(hidden, i) for i, hidden in enumerate(streams.original)]
    student = _student(run, section, writer, visit, block, entries)
    learned = [layer for _, layer in learned_layers(student.module)]

    def forward(hidden: Tensor, batch: int, samples: slice | None = None) -> Tensor:
        narrow = device.type != "cpu"
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow, cache_enabled=False):
            return student.learn(hidden, batch, samples)

    schedule = Schedule(
        steps=section.steps,
        learning_rate=section.learning_rate,
        code_rate=section.code_rate,
        check_every=max(1, section.steps // 4),
    )
    alike = student.alike(streams.quantized[: streams.num_train])
    enough = device.type != "cpu" and len(alike) >= MOST_OF_THEM * streams.num_train
    enough = enough and not routes_tokens(student.module)
    lesson = Lesson(
        forward,
        streams.quantized,
        targets,
        streams.num_train,
        alike if enough else (),
        forward,
        run.env.parts,
    )
    points = tune_block(learned, lesson, schedule, lambda _point: None)
    parts = {f"{block}.{name}": part for name, part in stored_parts(student.module)}
    return Made(parts, {"curve": [asdict(point) for point in points]})


def _student(
    run: Run,
    section: BlockTuning,
    writer: CheckpointWriter,
    visit: Visit,
    block: str,
    entries: Mapping[str, LayerEntry],
) -> Block:
    """Return the quantized block with layers that learn, as the solvers left them."""
    student = visit.quantized.copy()
    student.module.requires_grad_(requires_grad=False)
    layers = {
        name.removeprefix(f"{block}."): draft_of(writer, name, entry, run.env.device)
        for name, entry in entries.items()
    }
    install_layers(student.module, layers, moves_codes=section.code_rate > 0)
    quantize_inputs(
        student.module,
        {name.removeprefix(f"{block}."): entry.activation for name, entry in entries.items()},
    )
    return student
