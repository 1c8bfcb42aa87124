"""Classes of rows that share one launch: who gets how many blocks, and what runs by itself."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.runtime.backends.cuda import (
    classes,
    driver,
    grids,
    mixed,
    plane_plans,
    planes,
    selection,
)
from qtool.runtime.backends.cuda.classes import (
    CLASS_STAGES,
    UNIT_WORK,
    RowClass,
    plan_classes,
    share_blocks,
)
from qtool.runtime.backends.cuda.decode_ops import KernelOps
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.mixed import MixedWeight
from qtool.scheme import Shape2D, WeightScheme
from qtool.timing.shapes import find_shapes
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

CARD = Card(132, 227 * 1024, selection.H100.measured_on)
UNITS = 16


def row_class(num_bits: int, rows: int, group: int = 128) -> RowClass:
    return RowClass(rows, -(-rows // 16), planes.Layout(num_bits, group, 1))


def heads() -> dict[str, tuple[RowClass, ...]]:
    """Return the heads that are timed."""
    linears = find_shapes("llama3-8b-heads").linears
    return {each.name: tuple(row_class(*one) for one in each.rows) for each in linears if each.rows}


HEADS = heads()


def seconds(its: RowClass, blocks: int) -> float:
    return its.row_tiles * UNITS * (its.layout.stage_bytes + UNIT_WORK) / blocks


SOME = st.lists(
    st.builds(row_class, st.integers(1, 8), st.integers(1, 20_000)), min_size=1, max_size=3
)


@given(SOME, st.integers(1, 14))
def test_no_other_division_of_the_blocks_ends_sooner(some, blocks):
    shared = share_blocks(some, UNITS, blocks)
    assert min(shared) >= 1
    assert sum(shared) <= max(blocks, len(some))
    assert all(n <= its.row_tiles * UNITS for n, its in zip(shared, some, strict=True))

    def ends(counts):
        return max(itertools.starmap(seconds, zip(some, counts, strict=True)))

    ranges = [range(1, min(blocks, its.row_tiles * UNITS) + 1) for its in some]
    others = [other for other in itertools.product(*ranges) if sum(other) <= blocks]
    assert ends(shared) <= min(map(ends, others), default=ends(shared))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_head_fills_a_card_once_in_one_launch(name, batch):
    plan = plan_classes(HEADS[name], UNITS, batch, CARD)
    assert plan is not None
    widest = HEADS[name][0].layout.planes
    pairs = widest == 8  # a block alone would have two stages of them
    wanted = selection.H100.pairs if pairs else selection.H100.alone
    assert plan.tuning == replace(wanted, stages=max(wanted.stages, CLASS_STAGES))
    assert sum(plan.blocks) == 132 * plan.tuning.per_multiprocessor
    assert plan.shared_bytes <= grids.room_of(CARD, plan.tuning.per_multiprocessor)
    assert min(plan.stages) >= (2 if pairs else 3)
    ends = list(map(seconds, HEADS[name], plan.blocks))
    assert max(ends) < 1.05 * min(ends), "all end together"


def test_a_class_of_few_rows_gets_few_blocks():
    plan = plan_classes((row_class(8, 600), row_class(3, 127656)), UNITS, 1, CARD)
    assert plan is not None
    assert plan.blocks == (3, 261), plan


def test_classes_that_need_slabs_or_differ_in_groups_or_warps_are_not_put_together():
    four, two = row_class(4, 4096), row_class(2, 4096)
    assert plan_classes((four, two), UNITS, 1, CARD) is not None
    assert plan_classes((four, row_class(2, 4096, 64)), UNITS, 1, CARD) is None
    assert plan_classes((four, two), UNITS, 1, Card(132, 40 * 1024)) is None, "no room"
    assert plan_classes((row_class(4, 128256), two), UNITS, 16, CARD) is None, "in slabs"
    eight = row_class(8, 8550)
    card = Card(132, 144 * 1024)
    few = plane_plans.tuned_plan(eight.row_tiles, UNITS, 1, eight.layout, card=card)
    assert few is not None and few[0].warps < selection.H100.alone.warps
    assert plan_classes((eight, two), UNITS, 1, card) is None, "fewer warps"


def test_many_tokens_are_multiplied_class_by_class_where_each_looks_its_weights_up():
    four, two = row_class(4, 4096), row_class(2, 4096)
    assert plan_classes((four, two), UNITS, 8, CARD) is not None
    assert plan_classes((four, two), UNITS, 9, CARD) is None


def prepare(rows, inputs, device="cpu", dtype=torch.float16):
    scheme = WeightScheme(num_bits=rows[0][0], group_size=128, rows=rows)
    shape = Shape2D(sum(count for _, count in rows), inputs)
    tensor = random_tensor("mixed_rows", scheme, shape, 1)
    parts = {name: part.to(device) for name, part in tensor.parts.items()}
    weight = mixed.prepare_weight(replace(tensor, parts=parts), dtype)
    assert isinstance(weight, MixedWeight)
    return tensor, weight


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_has_no_room_beside_the_others_runs_before_them(batch):
    tensor, weight = prepare(((8, 17), (4, 16), (2, 40)), 512)
    card, launch, x = Card(3, 144 * 1024), Recorder(), normal(batch, 512).half()
    y = mixed.multiply_mixed(x, weight, launch, card)
    alone = planes.product_for(batch, planes.Layout(8, 128, 1), card).name
    assert launch.names == [alone, "bit_plane_classes"]
    expected = x.double() @ dequantized(tensor, torch.float64).T
    assert (y.double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("batch", "multiprocessors"), [(1, 23), (2, 7), (5, 12), (19, 12)])
@pytest.mark.parametrize("inputs", [1024, 700])
def test_tiles_that_cross_blocks_are_added_up_within_their_class(batch, multiprocessors, inputs):
    tensor, weight = prepare(((5, 50), (3, 33), (2, 130)), inputs)
    card, launch, x = Card(multiprocessors, 227 * 1024), Recorder(), normal(batch, inputs).half()
    y = mixed.multiply_mixed(x, weight, launch, card, kernel="planes")
    (call,) = launch.calls
    assert call.grid == (multiprocessors, 1, -(-batch // 16))
    assert sum(call.numbers[7::3]) == multiprocessors, "a block of each class and more"
    expected = x.double() @ dequantized(tensor, torch.float64).T
    assert (y.double() - expected).norm() < 1e-3 * expected.norm()


def test_a_launch_is_decided_once_and_none_reads_a_fresh_weight_ahead():
    _, weight = prepare(((4, 16), (2, 40)), 512)
    calls = []

    def launch(call, _):
        calls.append(call)

    x, y = normal(1, 512).half(), torch.empty(1, 56, dtype=torch.float16)
    parts = list(zip(weight.classes, weight.places, strict=True))
    for _ in range(2):
        classes.by_classes(x, parts, y, launch, CARD)
    parts[1] = (replace(weight.classes[1], fresh=True), weight.places[1])
    classes.by_classes(x, parts, y, launch, CARD)
    assert calls[0] is calls[1]
    assert [call.dependent for call in calls] == [True, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "dtype"), [(1, torch.float16), (2, torch.bfloat16), (3, torch.float16)]
)
@pytest.mark.parametrize(
    "rows", [((8, 300), (4, 700), (3, 1000), (2, 6000)), ((4, 1), (2, 2999)), ((4, 900), (3, 100))]
)
@torch.no_grad()
def test_replays_of_a_graph_read_new_inputs_and_are_read_whole(rows, batch, dtype):
    """Between a norm that makes x and one that reads y, all dependent launches."""
    pytest.importorskip("cupy")
    tensor, weight = prepare(rows, 1024, "cuda", dtype)
    ops = KernelOps(driver.launch, driver.card_of(0))
    width = weight.shape.out_features
    before, after = (torch.ones(n, dtype=dtype, device="cuda") for n in (1024, width))
    inputs = normal(20, batch, 1024).to("cuda", dtype)
    x = inputs[0].clone()

    def step():
        y = ops.linear(ops.rms_norm(x, before, 1e-6), weight)
        return y, ops.rms_norm(y, after, 1e-6)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    seen = []
    for index in list(range(20)) * 10:
        x.copy_(inputs[index])
        graph.replay()
        seen.append([each.clone() for each in captured])
    exact = dequantized(tensor, torch.float64).cuda()
    for index, (y, normed) in zip(list(range(20)) * 10, seen, strict=True):
        given = ops.rms_norm(inputs[index], before, 1e-6).double()
        error = (y.double() - given @ exact.T).abs()
        terms = given.abs() @ exact.abs().T
        assert bool((error <= 2 * torch.finfo(dtype).eps * terms).all())
        assert torch.equal(normed, ops.rms_norm(y, after, 1e-6))
