"""Products whose inputs come unit by unit, and slabs that are clusters, on the CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.runtime.backends.cuda import (
    linear_kernels,
    plane_plans,
    plane_products,
    planes,
    streamed,
)
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.tiles import Tiles
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder
from tests.kernels.test_wide import close

ONE = Card(1, 227 * 1024, warpgroups=True)
LAYOUTS = [planes.Layout(num_bits, 128, 1) for num_bits in (2, 3, 4)]


def multiplied(bits, group_size, shape, tokens, dtype, card, **more):
    scheme = WeightScheme(num_bits=bits, group_size=group_size)
    tensor = random_tensor("binary_coding", scheme, Shape2D(*shape), 0)
    weight, x = linear_kernels.prepare(tensor, dtype), normal(tokens, shape[1]).to(dtype)
    launch = Recorder()
    return plane_products.by_planes(x, weight, launch, card, **more), x, weight, launch


@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "tokens", "dtype"),
    [
        (3, 128, (13 * 16 + 5, 1024), 9, torch.float16),  # three warps help, one tile is ragged
        (4, 64, (37 * 16 - 4, 1000), 16, torch.bfloat16),  # the last of three CTAs lacks two tiles
        (3, 96, (16 * 16, 1280), 15, torch.float16),  # no warp helps
    ],
)
def test_streamed_products_are_those_of_the_weight(bits, group_size, shape, tokens, dtype):
    card = ONE._replace(multiprocessors=-(-shape[0] // 256))  # rows of a CTA
    y, x, weight, launch = multiplied(bits, group_size, shape, tokens, dtype, card)
    assert launch.names == [streamed.NAME]
    close(y, x, weight, twice=bits == 4)


def test_streamed_products_are_gated_or_added_to():
    for gated in (False, True):
        residual = None if gated else normal(10, 14 * 16).half()
        around: dict[str, Any] = {"residual": residual, "gated": gated}
        y, x, weight, launch = multiplied(3, 128, (14 * 16, 1024), 10, torch.float16, ONE, **around)
        assert launch.names == [streamed.NAME]
        alone = Recorder()
        before = plane_products.by_planes(
            x, weight, alone, ONE._replace(warpgroups=False), **around
        )
        assert alone.names == ["bit_plane_lookup_mma"]
        torch.testing.assert_close(y, before, rtol=2e-3, atol=2e-3)


def test_who_asks_for_planes_of_more_tokens_gets_what_cards_without_warpgroups_run(monkeypatch):
    monkeypatch.setenv("QTOOL_KERNEL", "planes")
    card = Card(132, 227 * 1024, warpgroups=True)
    for bits, rows, inputs, cluster in ((2, 57344, 8192, 2), (3, 8192, 28672, 8)):
        calls = []
        for tokens, on in ((16, card), (17, card), (17, card._replace(warpgroups=False))):
            sizes = (rows, inputs, tokens, rows // 16, inputs // 256, inputs // 128, rows)
            layout = planes.Layout(bits, 128, 1)
            calls.append(plane_products.call_for(sizes, layout, torch.float16, on))
        assert dict(calls[0].constants)["CLUSTER"] == cluster
        assert dict(calls[1].constants)["COLUMNS"] == 24
        assert calls[1] == calls[2]
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=3), Shape2D(14 * 16, 1024), 0)
    weight, x = linear_kernels.prepare(tensor, torch.float16), normal(20, 1024).half()
    y = linear_kernels.matmul(x, weight, launch := Recorder(), ONE)
    assert launch.names == ["bit_plane_lookup_mma"]
    close(y, x, weight, twice=False)


@pytest.mark.parametrize(("gated", "cluster"), [(False, 2), (True, 2), (False, 4)])
def test_blocks_of_a_cluster_add_up_their_slabs(gated, cluster, monkeypatch):
    monkeypatch.setattr(plane_plans, "LOOKED_UP_WAYS", ((32, cluster),))
    name = f"of {cluster}"  # of its own: plans are kept
    card = Card(9, 227 * 1024, name, warpgroups=True)
    size = (3 + gated, 64, (83 - 3 * gated, 1024), 9, torch.float16, card)
    y, x, weight, launch = multiplied(*size, gated=gated)
    assert launch.names == ["bit_plane_lookup_mma"]
    assert dict(launch.calls[0].constants)["CLUSTER"] == cluster
    if not gated:
        return close(y, x, weight, twice=False)
    gate, up = (x.double() @ weight.dense().double().T).unflatten(1, (-1, 2, 8)).unbind(2)
    torch.testing.assert_close(
        y.double(), (torch.nn.functional.silu(gate) * up).flatten(1), rtol=4e-3, atol=4e-3
    )


@given(
    row_tiles=st.integers(1, 9000),
    units=st.integers(1, 120),
    batch=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
)
def test_a_stream_has_every_unit_once_and_fits(row_tiles, units, batch, layout):
    card = Card(132, 227 * 1024, warpgroups=True)
    stream = streamed.stream_of(row_tiles, units, batch, layout, card)
    if stream is None:
        return
    assert 9 <= batch <= 16 and layout.planes > 2
    helpers = streamed.WARPS - stream.tiles
    assert stream.main + stream.rest == units
    assert stream.rest * stream.tiles <= helpers * (stream.main + units // stream.main + 1)
    assert stream.shared_bytes <= card.shared_bytes
    assert (
        streamed.stream_of(row_tiles, units, batch, layout, card._replace(warpgroups=False)) is None
    )


@pytest.mark.parametrize(
    ("planes_", "shape", "tokens", "kernel", "first"),
    [
        (3, (28672, 4096), 16, "planes", streamed.NAME),
        (2, (57344, 8192), 16, "planes", "bit_plane_lookup_mma"),
        (3, (28672, 4096), 17, "wide", None),
        (3, (4096, 4096), 16, "planes", "bit_plane_lookup_mma"),
        (4, (8192, 28672), 17, "wide", None),
    ],
)
def test_warpgroups_multiply_from_17_tokens_on(planes_, shape, tokens, kernel, first):
    card = Card(132, 227 * 1024, "NVIDIA H200", warpgroups=True)
    layout, (rows, inputs) = planes.Layout(planes_, 128, 1), shape
    tiles = Tiles(
        torch.empty(rows // 16, inputs // 256, planes_, 32, 4, dtype=torch.int32, device="meta"),
        torch.empty(rows // 16, inputs // 128, 8, planes_ + 1, 2, device="meta"),
    )
    scheme = WeightScheme(num_bits=planes_, group_size=128)
    weight = KernelWeight(scheme, Shape2D(*shape), torch.float16, tiles, None)
    assert linear_kernels.kernel_for(weight, tokens, card) == kernel
    if first:
        sizes = (rows, inputs, tokens, rows // 16, inputs // 256, inputs // 128, rows)
        assert plane_products.call_for(sizes, layout, torch.float16, card).file == first
