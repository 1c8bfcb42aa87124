"""Products of few tokens by looked-up weights, on the CPU, against the weight rounded once."""

import pytest
import torch

from qtool.runtime.backends.cuda import linear_kernels, plane_plans, plane_products, planes
from qtool.runtime.backends.cuda.launch import Card
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder
from tests.kernels.test_wide import close

CARD = Card(3, 227 * 1024)
WEIGHTS = {
    "3 planes": ("binary_coding", 3, 128, (128, 768), 8),
    "4 planes, the last tile ragged": ("binary_coding", 4, 128, (83, 512), 5),
    "2 planes, groups of 64": ("binary_coding", 2, 64, (64, 512), 16),
    "1 plane, a group per row": ("binary_coding", 1, None, (64, 600), 3),
    "3 planes, groups of 32": ("binary_coding", 3, 32, (64, 512), 9),
    "4 planes, groups of 32": ("binary_coding", 4, 32, (64, 256), 8),
    "groups of 192": ("binary_coding", 4, 192, (64, 1000), 11),
    "groups of 96": ("binary_coding", 2, 96, (64, 777), 4),
}


@pytest.fixture
def looked_up(monkeypatch):
    monkeypatch.setattr(planes, "product_for", lambda batch, *_: planes.looked_up(batch))
    cached = plane_plans.plan_launch, plane_plans.tuned_plan, plane_products.call_for
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(name, (torch.float16, torch.bfloat16)[place % 2]) for place, name in enumerate(WEIGHTS)]
    + [("3 planes", torch.bfloat16), ("4 planes, groups of 32", torch.float16)]
    + [("4 planes, the last tile ragged", torch.float16)],
)
@pytest.mark.usefixtures("looked_up")
def test_products_are_those_of_the_weight_rounded_once_or_of_a_sign_twice(kind, dtype):
    name, bits, group_size, shape, tokens = WEIGHTS[kind]
    scheme = WeightScheme(num_bits=bits, group_size=group_size)
    tensor = random_tensor(name, scheme, Shape2D(*shape), 0)
    weight, x, launch = (
        linear_kernels.prepare(tensor, dtype),
        normal(tokens, shape[1]).to(dtype),
        Recorder(),
    )
    y = plane_products.by_planes(x, weight, launch, CARD)
    assert launch.names == ["bit_plane_lookup_mma"]
    close(y, x, weight, twice=bits == 4)
