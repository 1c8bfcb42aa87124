"""The choice of kernels, grids and arguments, launched on the CPU."""

import pytest
import torch

from qtool.runtime import linear_kernels
from qtool.runtime.launch import Call, Card
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import host_kernels

SMALL = Card(multiprocessors=2, shared_bytes=48 * 1024)
WIDE = Card(multiprocessors=132, shared_bytes=227 * 1024)


class Recorder:
    """Launches on the CPU and notes what."""

    def __init__(self):
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> None:
        self.calls.append(call)
        kernels = host_kernels(call.file, tuple(sorted(call.constants.items())))
        kernels[call.kernel](call.grid, call.threads, call.shared_bytes, *call.arguments)

    @property
    def names(self) -> list[str]:
        return [call.kernel for call in self.calls]


def multiply(tensor, x, card=SMALL):
    launch = Recorder()
    weight = linear_kernels.prepare(tensor, x.dtype)
    return linear_kernels.matmul(x, weight, launch, card), launch


def check(tensor, x, card=SMALL):
    got, launch = multiply(tensor, x, card)
    exact = dequantized(tensor, torch.float64)
    terms = x.double().abs() @ exact.abs().T
    error = (got.double() - x.double() @ exact.T).abs()
    assert bool((error <= 2 * torch.finfo(x.dtype).eps * terms + 1e-30).all())
    return launch


@pytest.mark.parametrize("format_name", ["affine", "binary_coding"])
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
@pytest.mark.parametrize("size", [(3, 31, 8), (33, 65, 64), (17, 128, 32), (40, 300, None)])
def test_every_shape_and_grouping_is_multiplied(format_name, group_dim, size):
    *shape, group_size = size
    scheme = WeightScheme(num_bits=3, group_size=group_size, group_dim=group_dim)
    tensor = random_tensor(format_name, scheme, Shape2D(*shape), 0)
    check(tensor, normal(5, shape[1]).half())


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 16])
def test_few_tokens_go_through_the_planes_and_splits_fill_the_card(batch):
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=2, group_size=128), Shape2D(32, 4608), 1
    )
    launch = check(tensor, normal(batch, 4608).half(), WIDE)
    assert launch.names == ["bit_plane_mma", "add_splits"]
    assert launch.calls[0].grid[1] == 3  # 18 units: at least one for each of the eight warps
    assert launch.calls[0].shared_bytes <= WIDE.shared_bytes


def test_wide_inputs_are_split_by_what_shared_memory_holds():
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=1, group_size=256), Shape2D(64, 6144), 1
    )
    launch = check(tensor, normal(8, 6144).bfloat16(), SMALL)
    assert launch.calls[0].grid[1] > 1
    assert launch.calls[0].shared_bytes <= SMALL.shared_bytes


def test_many_tokens_go_through_a_dequantized_weight():
    tensor = random_tensor(
        "binary_coding", WeightScheme(num_bits=4, group_size=64), Shape2D(24, 320), 2
    )
    assert check(tensor, normal(17, 320).bfloat16()).names == ["dequantize"]


@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_rows_are_those_of_the_rounded_weight(group_dim):
    scheme = WeightScheme(num_bits=3, group_size=32, group_dim=group_dim)
    tensor = random_tensor("binary_coding", scheme, Shape2D(50, 96), 4)
    index = torch.tensor([[0, 49, 7], [7, 7, 31]])
    weight = linear_kernels.prepare(tensor, torch.float16)
    got = linear_kernels.rows(index, weight, Recorder())
    assert torch.equal(got, dequantized(tensor).half()[index])


def test_no_tokens_launch_nothing():
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=3), Shape2D(16, 128), 4)
    got, launch = multiply(tensor, torch.empty(0, 128, dtype=torch.float16))
    assert got.shape == (0, 16)
    assert launch.names == []
