"""Products by codes of equal steps, on the CPU, against float64; and others that read nibbles."""

from dataclasses import replace

import pytest
import torch

from qtool.runtime.backends.cuda import fusing, linear_kernels, plane_products, tiles
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder

CARD = Card(3, 227 * 1024)
HALF, BFLOAT = torch.float16, torch.bfloat16
WEIGHTS = {
    "4 bits": ("affine", 4, 128, (96, 512), 16),
    "3 bits, the last tile ragged": ("affine", 3, 64, (83, 768), 8),
    "2 bits, groups of 192": ("affine", 2, 192, (64, 1000), 11),
    "3 bits, a group per row": ("affine", 3, None, (48, 777), 5),
    "4 bits, groups of 96": ("affine", 4, 96, (48, 576), 8),
    "8 bits, groups of 32": ("affine", 8, 32, (64, 320), 9),
    "6 bits": ("affine", 6, 128, (64, 256), 4),
    "1 bit": ("affine", 1, 64, (64, 256), 4),
    "dint": ("dint", 3, 128, (64, 512), 5),
}


def prepared(name, bits, group_size, shape):
    scheme = WeightScheme(num_bits=bits, group_size=group_size)
    tensor = random_tensor(name, scheme, Shape2D(*shape), 0)
    return linear_kernels.prepare(tensor, torch.float32)


def multiplied(weight, tokens, dtype):
    """Return the launches of a product, which is compared."""
    x, launch = normal(tokens, weight.shape.in_features).to(dtype), Recorder()
    x[:, ::7] *= 1e-3
    y = plane_products.by_planes(x, weight, launch, CARD).double()
    dense = weight.dense().double()
    expected, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    error, rounding = (y - expected).abs(), torch.finfo(dtype).eps / 2
    assert bool((error <= 1e-6 * terms + rounding * expected.abs()).all())
    return launch.names


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(name, (HALF, BFLOAT)[place % 2]) for place, name in enumerate(WEIGHTS)]
    + [("4 bits", BFLOAT), ("8 bits, groups of 32", BFLOAT)],
)
def test_products_of_codes_round_nothing_but_what_they_return(kind, dtype):
    *weight, tokens = WEIGHTS[kind]
    assert multiplied(prepared(*weight), tokens, dtype) == ["bit_plane_codes_mma"]


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_all_that_reads_nibbles_reads_the_weight(bits):
    weight = prepared("affine", bits, 64, (40, 320))
    tokens, dtype = 4 if bits in (2, 3) else 1 + bits % 2, (HALF, BFLOAT)[bits % 2]
    assert multiplied(weight, tokens, dtype) == ["bit_plane_imma"]
    fine = prepared("affine", bits, 32, (40, 320))
    assert multiplied(fine, 1, dtype) == ["bit_plane_codes_mma"]
    for each in (replace(weight, dtype=dtype), replace(fine, dtype=dtype)):
        dense = each.dense()
        assert torch.equal(linear_kernels.dense_weight(each, Recorder()), dense)
        index = torch.tensor([0, 39, 17])
        assert torch.equal(linear_kernels.rows(index, each, Recorder()), dense[index])


@pytest.mark.parametrize("bits", range(1, 9))
def test_nibbles_hold_the_planes(bits):
    planes_of_weight = torch.randint(0, 2, (bits, 16, 512), dtype=torch.uint8)
    packed = tiles.pack_planes(planes_of_weight, nibbled=True)
    assert torch.equal(tiles.unpack_planes(packed, nibbled=True), planes_of_weight)


@pytest.mark.parametrize("bits", range(1, 9))
def test_halves_of_a_weight_whose_rows_alternate_are_what_they_were(bits):
    scheme = WeightScheme(num_bits=bits, group_size=64)
    pair = [random_tensor("affine", scheme, Shape2D(24, 320), seed) for seed in (0, 1)]
    fused = fusing.fuse(pair, HALF, interleave=True)
    assert fused is not None
    for tensor, half in zip(pair, fused.parts, strict=True):
        assert torch.equal(half.dense(), linear_kernels.prepare(tensor, HALF).dense())
