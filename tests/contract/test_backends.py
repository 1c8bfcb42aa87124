"""Every backend against the definition of the format in float64."""

import pytest
import torch

import qtool.runtime.backends
from qtool import plugins
from qtool.errors import BackendError
from qtool.runtime.select import choose_backend, load_backend
from qtool.scheme import GROUP_DIMS, Shape2D, WeightScheme
from tests.contract.test_codecs import FORMATS, random_tensor
from tests.helpers import dequantized, normal

BACKENDS = plugins.names(qtool.runtime.backends)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = [1, 2, 3, 8, 9, 17]  # at which the kernels change
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# out_features, in_features, group size: odd widths, less than a word, groups that don't divide.
SIZES = [(1, 1, None), (3, 31, 8), (33, 65, 64), (64, 96, 128), (17, 128, 32), (130, 40, 1)]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("name", BACKENDS),
]


def prepared(name, tensor, device, dtype):
    """Return a backend and a weight prepared on a device; skip what the backend refuses."""
    backend = load_backend(name)
    parts = {part: values.to(device) for part, values in tensor.parts.items()}
    moved = type(tensor)(tensor.format, tensor.scheme, tensor.shape, parts)
    reason = backend.why_not(moved, torch.device(device))
    if reason is not None:
        assert reason.endswith("."), "why_not gives a sentence"
        with pytest.raises(BackendError, match=name):
            choose_backend(moved, torch.device(device), name)
        pytest.skip(f"{name}: {reason}")
    return backend, backend.prepare(moved, dtype)


def check_matmul(name, device, tensor, x):
    """Compare with x @ W.T in float64, within the rounding of weights and result."""
    backend, weight = prepared(name, tensor, device, x.dtype)
    got = backend.matmul(x.to(device), weight)
    exact, x = dequantized(tensor, torch.float64), x.cpu()
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], tensor.shape.out_features)
    terms = x.double().abs() @ exact.abs().T
    error = (got.cpu().double() - x.double() @ exact.T).abs()
    rounding = 2 * torch.finfo(x.dtype).eps + 2**-20  # the sum itself: float32 or better
    assert bool((error <= rounding * terms + 1e-30).all())


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_matmul_equals_the_definition_at_odd_shapes(
    name, device, format_name, dtype, size, group_dim
):
    *shape, group_size = size
    scheme = WeightScheme(num_bits=3, group_size=group_size, group_dim=group_dim)
    tensor = random_tensor(format_name, scheme, Shape2D(*shape), 0)
    check_matmul(name, device, tensor, normal(5, shape[1]).to(dtype))


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_matmul_equals_the_definition_for_every_width(name, device, num_bits, symmetric, tokens):
    scheme = WeightScheme(num_bits=num_bits, group_size=64, symmetric=symmetric)
    tensor = random_tensor("binary_coding", scheme, Shape2D(24, 320), num_bits)
    check_matmul(name, device, tensor, normal(tokens, 320).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 192, None])
def test_matmul_equals_the_definition_for_wide_inputs(name, device, dtype, tokens, group_size):
    scheme = WeightScheme(num_bits=3, group_size=group_size)
    tensor = random_tensor("binary_coding", scheme, Shape2D(40, 3072), 6)
    check_matmul(name, device, tensor, normal(tokens, 3072).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_in_the_input_do_not_drown_the_rest(name, device, dtype):
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=4), Shape2D(48, 160), 1)
    x = normal(4, 160)
    x[:, 7] = 900.0
    x[1, 100] = -1500.0
    x[2] = 0
    check_matmul(name, device, tensor, x.to(dtype))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (1, 1, 17), (0,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_of_the_input_are_kept(name, device, leading, dtype):
    tensor = random_tensor("affine", WeightScheme(num_bits=4, group_size=32), Shape2D(12, 40), 2)
    check_matmul(name, device, tensor, normal(*leading, 40).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_shifted_input_is_read_like_a_contiguous_one(name, device, dtype):
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=2), Shape2D(12, 40), 3)
    check_matmul(name, device, tensor, normal(40, 9).to(dtype).T)
    moved = normal(41).to(dtype).to(device)[1:].view(1, 40)  # contiguous, and not aligned
    check_matmul(name, device, tensor, moved)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_rows_equal_the_definition(name, device, format_name, dtype, group_dim):
    scheme = WeightScheme(num_bits=3, group_size=16, group_dim=group_dim)
    tensor = random_tensor(format_name, scheme, Shape2D(50, 36), 4)
    backend, table = prepared(name, tensor, device, dtype)
    index = torch.tensor([[0, 49, 7], [7, 7, 31]])
    got = backend.rows(index.to(device), table).cpu()
    assert got.shape == (2, 3, 36)
    expected = dequantized(tensor, torch.float64)[index]
    error = (got.double() - expected).abs()
    assert bool((error <= torch.finfo(dtype).eps * expected.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_it_repeats_itself_and_leaves_the_input_alone(name, device, dtype, tokens):
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=3), Shape2D(200, 1000), 5)
    kept = normal(tokens, 1000).to(dtype)
    x = kept.clone().to(device)
    backend, weight = prepared(name, tensor, device, dtype)
    first = backend.matmul(x, weight)
    assert torch.equal(x.cpu(), kept)
    assert all(torch.equal(first, backend.matmul(x, weight)) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_two_streams_and_a_replayed_graph_give_the_same(name, device, tokens):
    if device == "cpu":
        pytest.skip("streams are a card's")
    tensor = random_tensor("binary_coding", WeightScheme(num_bits=3), Shape2D(1000, 2000), 5)
    x = normal(tokens, 2000).half().to(device)
    backend, weight = prepared(name, tensor, device, x.dtype)
    expected = backend.matmul(x, weight)
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.graph(graph):
        captured = backend.matmul(x, weight)
    results = []
    for _ in range(20):
        graph.replay()
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(backend.matmul(x, weight))
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert all(torch.equal(result, expected) for result in results)


def test_name_is_that_of_its_file(name, device):
    del device
    assert load_backend(name).name == name
