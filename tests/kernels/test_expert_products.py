"""Products with the weights of chosen experts, launched on the CPU."""

import pytest
import torch

from qtool.runtime.backends.cuda import expert_products, fusing
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

SMALL = Card(multiprocessors=4, shared_bytes=100 * 1024)


def stacked(format_name, scheme, shape, count):
    tensors = [random_tensor(format_name, scheme, shape, seed) for seed in range(count)]
    fused = fusing.fuse(tensors, torch.float16)
    assert fused is not None and isinstance(fused.prepared, KernelWeight)
    return tensors, fused.prepared


@pytest.mark.parametrize("format_name", ["affine", "binary_coding"])
@pytest.mark.parametrize(
    ("num_bits", "group_size", "inputs"), [(4, 128, 320), (3, 32, 96), (2, 64, 1280)]
)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_each_slot_is_multiplied_by_its_experts_weight(
    format_name, num_bits, group_size, inputs, slots
):
    scheme = WeightScheme(num_bits=num_bits, group_size=group_size)
    tensors, weight = stacked(format_name, scheme, Shape2D(48, inputs), 5)
    generator = torch.Generator().manual_seed(slots)
    chosen = torch.randint(0, 5, (slots,), generator=generator, dtype=torch.int32)
    x, launch = normal(slots, inputs).half(), Recorder()
    got = expert_products.multiply_chosen(x, weight, chosen, 5, launch, SMALL)
    for slot, expert in enumerate(chosen.tolist()):
        exact = dequantized(tensors[expert], torch.float64)
        terms = x[slot].double().abs() @ exact.abs().T
        error = (got[slot].double() - x[slot].double() @ exact.T).abs()
        assert bool((error <= 2 * torch.finfo(x.dtype).eps * terms + 1e-30).all())
    assert len(launch.calls) == 1
    assert launch.calls[0].shared_bytes <= SMALL.shared_bytes


def test_inputs_that_do_not_fit_are_cut_into_slabs():
    scheme = WeightScheme(num_bits=2, group_size=64)
    tensors, weight = stacked("binary_coding", scheme, Shape2D(16, 18432), 2)
    x, launch = normal(2, 18432).half(), Recorder()
    small = Card(multiprocessors=2, shared_bytes=64 * 1024)
    got = expert_products.multiply_chosen(
        x, weight, torch.tensor([1, 0], dtype=torch.int32), 2, launch, small
    )
    assert launch.names[-1] == "add_splits"
    for slot, expert in enumerate((1, 0)):
        exact = x[slot].double() @ dequantized(tensors[expert], torch.float64).T
        assert float((got[slot].double() - exact).norm() / exact.norm()) < 1e-3
