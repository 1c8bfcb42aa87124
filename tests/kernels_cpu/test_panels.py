"""Groups along out_features: each input has scales of its own in each group of rows."""

from dataclasses import replace

import pytest
import torch

from qtool.core.native import building, library
from qtool.runtime.backends._choose import load_backend
from qtool.runtime.backends.cpu import operators
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
LEVELS = list(building.instruction_levels())
# rows, inputs, rows of a group: blocks of unlike length, a short last group, odd inputs, all rows
CASES = [(200, 1300, 64), (300, 96, 128), (700, 515, 600), (100, 33, 16), (320, 1024, None)]


def weight(case, num_bits, format="binary_coding", **changes):
    rows, inputs, size = case
    scheme = WeightScheme(num_bits=num_bits, group_size=size, group_dim="out_features", **changes)
    return random_tensor(format, scheme, Shape2D(rows, inputs), seed=num_bits)


def error_of(tensor, x):
    backend = load_backend("cpu")
    prepared = backend.prepare(tensor, torch.float32)
    exact = x.double() @ dequantized(tensor, torch.float64).T
    return ((prepared.multiply(x) - exact).norm(dim=1) / exact.norm(dim=1)).max()


@pytest.mark.parametrize(("kind", "most"), [("int16", 1e-4), ("int8", 1e-2), ("float32", 1e-6)])
@pytest.mark.parametrize("level", LEVELS)
def test_products_are_those_of_float64_at_every_level(level, kind, most, monkeypatch):
    if LEVELS.index(level) < LEVELS.index(library.best_level()):
        pytest.skip("this processor has no such instructions")
    monkeypatch.setenv("QTOOL_CPU_LEVEL", level)
    monkeypatch.setenv("QTOOL_CPU_TABLES", kind)
    for num_bits, case in enumerate(CASES, start=1):
        assert error_of(weight(case, num_bits), normal(7, case[1])) <= most


@pytest.mark.parametrize("format", ["binary_coding", "affine"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_formats_and_rows(format, symmetric):
    tensor = weight((200, 1300, 64), 4, format, symmetric=symmetric)
    assert error_of(tensor, normal(3, 1300)) <= 1e-3  # offsets of float16
    index = torch.tensor([199, 0, 64, 63, 128])
    prepared = load_backend("cpu").prepare(tensor, torch.float32)
    exact = dequantized(tensor, torch.float64)
    torch.testing.assert_close(prepared.rows(index).double(), exact[index], atol=3e-3, rtol=3e-3)
    assert torch.equal(operators.packed_dense(prepared)[index], prepared.rows(index))


def test_an_outlier_channel_does_not_spoil_the_others():
    tensor = weight((256, 512, 128), 3)
    parts = dict(tensor.parts)
    for name in ("plane_scales", "plane_offsets"):
        parts[name] = parts[name].clone()
        parts[name][..., 5] *= 50
    x = normal(2, 512)
    assert error_of(replace(tensor, parts=parts), x) <= 2e-4
