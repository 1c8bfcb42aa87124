"""Products of many tokens: the kernels' own text, on the CPU, against the weight rounded once."""

import pytest
import torch

from qtool.runtime.backends.cuda import linear_kernels, wide
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.planes import Layout, Target
from qtool.runtime.backends.cuda.wide import WideTuning
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder

ROOM = 227 * 1024
AFTER_CAST = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
WEIGHTS = {
    "3 planes": ("binary_coding", 3, 128, (128, 768)),
    "4 planes, the last tile ragged": ("binary_coding", 4, 128, (83, 512)),
    "2 planes, groups of 64": ("binary_coding", 2, 64, (64, 512)),
    "1 plane, a group per row": ("binary_coding", 1, None, (64, 600)),
    "groups of 32": ("binary_coding", 3, 32, (64, 256)),
    "groups of 192": ("binary_coding", 4, 192, (64, 1000)),
    "groups of 96": ("binary_coding", 2, 96, (64, 777)),
    "5 planes, groups of 32": ("binary_coding", 5, 32, (64, 256)),
    "8 bits, affine": ("affine", 8, 128, (64, 512)),
    "4 bits, affine": ("affine", 4, 128, (96, 512)),
}


def multiplied(weight, x, tuning, ctas, *, epilogue="none", residual=None, places=None):
    """Return the product, and the launches; y is as wide as there are outputs."""
    launch, shape = Recorder(), weight.shape
    width = shape.out_features // (2 if epilogue == "gated" else 1)
    y = torch.full((len(x), width), torch.nan, dtype=x.dtype)
    wide.multiply_wide(
        *(x, weight.tiles, shape, weight.layout, launch, Card(ctas, ROOM), tuning),
        Target(y, places),
        epilogue=epilogue,
        residual=residual,
    )
    assert launch.names == ["order_inputs", "bit_plane_wgmma"]
    return y, launch


def close(y, x, weight):
    """Compare with the product in float64 of the weight as dense backends have it.

    So all that differs are float32 sums and the cast of y, but for more than four planes, which are
    rounded twice.
    """
    expected, dense = x.double() @ weight.dense().double().T, weight.dense().double()
    twice = 0.0 if weight.scheme.num_bits <= 4 else torch.finfo(x.dtype).eps
    allowed = (1e-6 + twice) * (x.double().abs() @ dense.abs().T)
    error = (y.double() - expected).abs()
    assert bool((error <= allowed + AFTER_CAST[y.dtype] * expected.abs()).all())


@pytest.mark.parametrize("kind", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", AFTER_CAST)
def test_products_are_those_of_the_weight_rounded_once(kind, dtype):
    name, bits, group_size, shape = kind
    tensor = random_tensor(name, WeightScheme(num_bits=bits, group_size=group_size), Shape2D(*shape), 0)
    weight, x = linear_kernels.prepare(tensor, dtype), normal(17, shape[1]).to(dtype)
    y, _ = multiplied(weight, x, WideTuning(columns=32, groups=1), ctas=2)
    close(y, x, weight)


@pytest.mark.parametrize(
    ("ctas", "tokens", "tuning"),
    [
        (1, 16, WideTuning(columns=16, groups=2, x_blocks=2)),
        (3, 20, WideTuning(columns=16, groups=1, x_blocks=2)),  # tiles of tokens, parts of a half
        (5, 33, WideTuning(columns=48, groups=2)),
        (12, 9, WideTuning(columns=16, groups=1)),  # a tile is of several blocks
        (99, 1, WideTuning(columns=16, groups=1, x_blocks=2)),  # no more blocks than units
    ],
)
def test_any_number_of_blocks_shares_a_weight(ctas, tokens, tuning):
    scheme, shape = WeightScheme(num_bits=3, group_size=128), Shape2D(140, 1200)
    weight = linear_kernels.prepare(random_tensor("binary_coding", scheme, shape, 1), torch.float16)
    x = normal(tokens, shape.in_features).half()
    y, launch = multiplied(weight, x, tuning, ctas)
    close(y, x, weight)
    tiles = -(-shape.out_features // (64 * tuning.groups)) * -(-tokens // tuning.columns)
    assert launch.calls[1].grid == (min(ctas, 5 * tiles), 1, 1)
