"""What torch knows of the kernels without a card, and that a compiled model is one graph on one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtool.runtime import linear_kernels, operators
from qtool.runtime.backends import cuda
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal


def weight(device="cpu"):
    scheme = WeightScheme(num_bits=3, group_size=64)
    tensor = random_tensor("binary_coding", scheme, Shape2D(48, 320), 1)
    parts = {name: part.to(device) for name, part in tensor.parts.items()}
    moved = type(tensor)(tensor.format, scheme, tensor.shape, parts)
    return tensor, linear_kernels.prepare(moved, torch.float16)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
def test_shapes_and_dtypes_are_known_without_running(leading):
    _, prepared = weight()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = operators.matmul_operator(torch.empty((*leading, 320), dtype=torch.float16), prepared)
        found = operators.rows_operator(torch.empty(leading, dtype=torch.int64), prepared)
    assert (y.shape, y.dtype) == ((*leading, 48), torch.float16)
    assert (found.shape, found.dtype) == ((*leading, 320), torch.float16)


@pytest.mark.gpu
def test_operators_keep_what_they_promise():
    tensor, prepared = weight("cuda")
    flat = operators._flat(prepared)
    x, index = normal(2, 320).half().cuda(), torch.tensor([3, 47]).cuda()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qtool.matmul, (x, *flat), test_utils=tests)
    torch.library.opcheck(torch.ops.qtool.rows, (index, torch.float16, *flat), test_utils=tests)
    expected = x.cpu().double() @ dequantized(tensor, torch.float64).T
    assert torch.allclose(
        operators.matmul_operator(x, prepared).cpu().double(), expected, 1e-2, 0.1
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_a_compiled_function_is_one_graph_for_prefill_and_decoding():
    _, prepared = weight("cuda")

    def layer(x):
        return torch.nn.functional.silu(cuda.BACKEND.matmul(x, prepared))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (1, 5, 40):
        x = normal(tokens, 320).half().cuda()
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-2, atol=1e-2)
