import pytest
import torch

from qtool.scheme import WeightScheme
from qtool.timing import timing
from tests.contract.test_codecs import random_tensor
from tests.unit.timing.rig import CountingTimer

MB = 2**20


@pytest.mark.parametrize(
    ("weight", "l2", "copies"),
    [(5 * MB, 50 * MB, 30), (35 * MB, 50 * MB, 5), (140 * MB, 50 * MB, 2), (10**9, 50 * MB, 2)],
)
def test_a_replay_reads_three_times_what_the_cache_holds(weight, l2, copies):
    assert timing.copies_needed(weight, l2) == copies


@pytest.mark.parametrize("copies", [1, 2, 7, 20, 30])
def test_every_copy_is_called_equally_often_and_in_turn(copies):
    order = timing.rotation(range(copies))
    assert len(order) >= timing.LEAST_CALLS
    assert order[: 2 * copies] == ([*range(copies)] * 2)[: len(order)]
    assert len({order.count(copy) for copy in range(copies)}) == 1


def test_time_of_a_call_is_the_median_replay_over_the_number_of_calls():
    calls = [lambda: None] * 4
    assert timing.time_calls(calls, lambda _calls: [9.0, 2.0, 1.0]) == 0.5


def test_clones_share_no_memory_and_no_clone_differs():
    from qtool.runtime.backends.cuda import linear_kernels
    from qtool.scheme import Shape2D

    scheme = WeightScheme(num_bits=2, group_size=32)
    tensor = random_tensor("binary_coding", scheme, Shape2D(32, 64), 0)
    weight = linear_kernels.prepare(tensor, torch.float16, keep_stored=True)
    first, second, third = timing.clones(weight, 100, 100)
    assert first is weight
    assert first.tiles is not None
    assert second.tiles is not None
    assert torch.equal(first.tiles.planes, second.tiles.planes)
    assert third.stored is not None
    parts = [tensor.parts["bit_planes"], third.stored.parts["bit_planes"]]
    assert torch.equal(*parts)
    assert parts[0].data_ptr() != parts[1].data_ptr()
    assert first.tiles.planes.data_ptr() != second.tiles.planes.data_ptr()
    assert (second.scheme, second.shape) == (weight.scheme, weight.shape)


def test_copy_bandwidth_counts_bytes_read_and_written():
    timer = CountingTimer()
    assert timing.copy_bandwidth(torch.device("cpu"), timer, 1000) == pytest.approx(2000 / 1e-6)
    assert timer.calls == [timing.COPIES_PER_REPLAY]


@pytest.mark.gpu
def test_a_copy_on_the_card_is_as_fast_as_its_memory():
    device = torch.device("cuda", 0)
    bandwidth = timing.copy_bandwidth(device, timing.CudaTimer(device))
    assert 3e11 < bandwidth < 2e13
