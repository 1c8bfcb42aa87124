"""Products of few tokens by codes of equal steps, on the CPU, against the weight rounded once."""

import pytest
import torch

from qtool.runtime.backends.cuda import linear_kernels, plane_products, planes
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder

CARD = Card(3, 227 * 1024)
WEIGHTS = {
    "4 bits": ("affine", 4, 128, (96, 512), 16),
    "3 bits, the last tile ragged": ("affine", 3, 64, (83, 768), 8),
    "2 bits, groups of 192": ("affine", 2, 192, (64, 1000), 11),
    "3 bits, a group per row": ("affine", 3, None, (48, 777), 3),
    "dint": ("dint", 3, 128, (64, 512), 5),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_products_by_codes_are_those_in_float64(kind, dtype):
    name, bits, group_size, shape, tokens = WEIGHTS[kind]
    scheme = WeightScheme(num_bits=bits, group_size=group_size)
    tensor = random_tensor(name, scheme, Shape2D(*shape), 0)
    weight = linear_kernels.prepare(tensor, torch.float32)
    x, launch = normal(tokens, shape[1]).to(dtype), Recorder()
    x[:, ::7] *= 1e-3
    y = plane_products.by_planes(x, weight, launch, CARD).double()
    assert launch.names == ["bit_plane_codes_mma"]
    dense = weight.dense().double()
    expected, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    error, rounding = (y - expected).abs(), torch.finfo(dtype).eps / 2
    assert bool((error <= 1e-6 * terms + rounding * expected.abs()).all())
