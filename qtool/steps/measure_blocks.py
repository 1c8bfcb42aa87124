"""What blocks cost, measured on a few of them: the run itself, with clocks, on a cut plan."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby

from qtool.checkpoint.writer import CheckpointWriter
from qtool.modeling.source import ModelSource
from qtool.recipe.tuning import BlockTuning
from qtool.steps.correct_biases import announced_biases, correct_biases_once
from qtool.steps.fold import FoldSearch, wanted_groups
from qtool.steps.plan import LayerPlan, Plan
from qtool.steps.run import Run
from qtool.steps.solve import LayerResult, block_of, solve_layer_once, walking
from qtool.steps.tune_blocks import tuned_block
from qtool.steps.usage import Meter
from qtool.walk.walk import Walk

CAPTURED, ADVANCE, BIASES = "capture", "advance", "biases"
FIRST_FOLD, NEXT_FOLD = "first fold", "next fold"
FEW_STEPS, MORE_STEPS = 4, 12
"""Of block tuning, both with five looks at the held-out samples, as it has with all its steps."""
MEASURED_KINDS = 3
"""Of blocks are measured: the most frequent."""


def kind_of(source: ModelSource, layer: LayerPlan) -> str:
    """Return what layers have in common that cost the same: place in the block, shape, and how."""
    inner = layer.name.removeprefix(block_of(source, layer) + ".")
    same = (layer.shape, layer.scheme, layer.methods, layer.choose_group_dim, layer.activation)
    return f"{inner} {same!r}"


def planned_blocks(source: ModelSource, plan: Plan) -> list[tuple[LayerPlan, ...]]:
    """Return the layers of each block that has some."""
    return [tuple(layers) for _, layers in groupby(plan.in_blocks, partial(block_of, source))]


def stand_ins(source: ModelSource, plan: Plan) -> list[tuple[LayerPlan, ...]]:
    """Return blocks that stand in for all others: one of each kind, the most frequent first.

    They are moved to the beginning of the model, where the walk is at once, if the blocks there
    have layers of the same shapes.
    """
    blocks = planned_blocks(source, plan)
    kinds = [tuple(kind_of(source, layer) for layer in block) for block in blocks]
    examples = dict(zip(reversed(kinds), reversed(blocks), strict=True))
    names, found, start = set(source.block_linears()), list[tuple[LayerPlan, ...]](), 0
    for kind, _ in Counter(kinds).most_common(MEASURED_KINDS):
        for index in range(start, source.num_blocks):
            moved = tuple(_moved(source, examples[kind], index))
            if all(
                layer.name in names and source.weight_shape(layer.name) == layer.shape
                for layer in moved
            ):
                found.append(moved)
                start = index + 1
                break
    return found


def _moved(source: ModelSource, layers: Sequence[LayerPlan], index: int) -> Iterator[LayerPlan]:
    for layer in layers:
        inner = layer.name.removeprefix(block_of(source, layer))
        yield replace(layer, name=f"{source.adapter.blocks}.{index}{inner}")


def measure_blocks(run: Run, writer: CheckpointWriter, meter: Meter) -> dict[str, LayerResult]:
    """Capture, solve, correct and tune the blocks of `stand_ins`, and pass them.

    Args:
        run: The whole run.
        writer: Of a place that is thrown away.
        meter: Gets `CAPTURED`, `ADVANCE`, `BIASES`, layers by `kind_of`, and tuning by its steps.

    Returns:
        What was solved, by `kind_of`.
    """
    found: dict[str, LayerResult] = {}
    blocks = stand_ins(run.source, run.plan)
    cut = replace(run, plan=replace(run.plan, layers=tuple(chain(*blocks))))
    tuning = run.recipe.tuning.blocks
    with walking(cut, writer) as walk:
        biased, index = announced_biases(cut), -1
        for number, layers in enumerate(blocks):
            block = block_of(run.source, layers[0])
            index = int(block.rpartition(".")[2])
            if walk is not None:
                with meter.measuring(ADVANCE if number else CAPTURED):
                    walk.visit(index)
            results = [_solved(cut, writer, layer, walk, meter) for layer in layers]
            found |= zip((kind_of(run.source, layer) for layer in layers), results, strict=True)
            if walk is not None and tuning is not None:
                _tune(cut, tuning, writer, walk, results, meter)
            if walk is not None and block in biased:
                with meter.measuring(BIASES):
                    correct_biases_once(cut, writer, walk, block, biased[block])
        if walk is not None and blocks and index + 1 < run.source.num_blocks:
            with meter.measuring(ADVANCE):
                walk.visit(index + 1)
    return found


def _solved(
    run: Run, writer: CheckpointWriter, layer: LayerPlan, walk: Walk | None, meter: Meter
) -> LayerResult:
    with meter.measuring(kind_of(run.source, layer)):
        return solve_layer_once(run, writer, layer, walk)


def _tune(
    run: Run,
    section: BlockTuning,
    writer: CheckpointWriter,
    walk: Walk,
    results: Sequence[LayerResult],
    meter: Meter,
) -> None:
    """Tune a block for a few steps, twice: the difference is what steps alone take."""
    entries = {result.name: result.entry for result in results}
    block = block_of(run.source, results[0])
    for steps in (FEW_STEPS, MORE_STEPS):
        few = section.model_copy(update={"steps": steps})
        with meter.measuring(tuning_for(steps)):
            tuned_block(run, few, writer, walk, block, entries)


def tuning_for(steps: int) -> str:
    """Return under which name tuning of a block for some steps is measured."""
    return f"tuning for {steps} steps"


def measure_fold(run: Run, meter: Meter) -> None:
    """Find the factors of the first two blocks, if the recipe folds any."""
    section = run.recipe.fold
    if section is None:
        return
    search = FoldSearch(run, section)
    for index, name in list(enumerate((FIRST_FOLD, NEXT_FOLD)))[: run.source.num_blocks]:
        with meter.measuring(name):
            search(index, list(wanted_groups(run.source, section, index)))
