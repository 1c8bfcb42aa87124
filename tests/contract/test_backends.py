"""Every backend against the definition of the format in float64."""

import functools
import itertools
from typing import Any

import pytest
import torch

import qtool.formats
import qtool.runtime.backends
from qtool import plugins
from qtool.checkpoint.manifest import LayerEntry
from qtool.core.activations import quantize_activations
from qtool.errors import BackendError
from qtool.formats.ordered_affine import encode_ordered
from qtool.runtime import differentiable
from qtool.runtime.backends._choose import choose_backend, load_backend, use_backend
from qtool.runtime.backends.cuda.fusing import APART
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.modules import QuantizedLinear
from qtool.scheme import GROUP_DIMS, ActivationScheme, Shape2D, WeightScheme
from qtool.steps.plan import load_method
from tests.helpers import (
    dequantized,
    encrypted,
    normal,
    problem,
    rounding_of_steps,
    sparse,
    stepped,
)
from tests.mixed import solved_mixed

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "affine": ("rtn", {}),
    "binary_coding": ("bcq", {"rounds": 1}),
    "coded_scales": ("bcq", {"rounds": 1, "scales": "coded"}),
    "dint": ("dint", {"clip_candidates": 3}),
}
FORMATS = plugins.names(qtool.formats)
STEPPED = ("minima", "nested")
ENCODED = {"encrypted_planes": encrypted, "sparse_planes": sparse}
ROUNDING = {"cuda": STEPPED, "cpu": STEPPED}
"""Of backends, formats of whose weights it rounds parameters to float16."""
ROUNDS_FLOAT32 = ("cpu",)
"""Of these, those that do so for float32 activations as well."""
TABLES = ("cpu",)
"""Those that look up sums of inputs, in 16 bits."""
FUSING = ("cuda", "dense")
"""Of qtool's own, those that make one of several weights; others may leave them apart."""
BACKENDS = plugins.names(qtool.runtime.backends)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = [1, 2, 3, 8, 9, 17]  # at which the kernels change
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# out_features, in_features, group size: odd widths, less than a word, groups that don't divide.
SIZES = [(1, 1, None), (3, 31, 8), (33, 65, 64), (64, 96, 128), (17, 128, 32), (130, 40, 1)]

QUANTIZED_INPUTS = (
    WeightScheme(num_bits=4, group_size=32),
    WeightScheme(num_bits=4, group_size=None),
    WeightScheme(num_bits=8, group_size=None, symmetric=True),
    WeightScheme(num_bits=8, group_size=None),
)
"""Of weights: in groups, and with one scale per row, which integers can be multiplied by."""
STEPPED_SCHEMES = tuple(
    WeightScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    for num_bits, group_size in ((2, 16), (4, 32), (5, 32), (6, 16), (8, 64), (3, None))
    for symmetric in (False, True)
)
STEPPED_NAMES = [f"{s.num_bits}-{s.group_size}-{s.symmetric}" for s in STEPPED_SCHEMES]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("name", BACKENDS),
]


@functools.cache
def solved(format_name, scheme, shape, seed):
    """Return a weight of a format as a method makes it."""
    if format_name == "mixed_rows":
        widest = scheme.num_bits + 1
        row_bits = [widest - row % min(4, widest) for row in range(shape.out_features)]
        return solved_mixed(normal(*shape, seed=seed), row_bits, scheme.group_size)
    if format_name == "ordered_affine":
        plain = solved("affine", scheme, shape, seed)
        order = torch.randperm(shape.in_features, generator=torch.Generator().manual_seed(seed))
        return encode_ordered(plain, order)
    if format_name in STEPPED:
        return stepped(format_name, scheme, shape, seed)
    if format_name in ENCODED:
        return ENCODED[format_name](normal(*shape, seed=seed), scheme)
    method_name, options = SOLVERS[format_name]
    method = load_method(method_name)
    given = problem(normal(*shape, seed=seed), scheme)
    tensor = method.solve(given, method.options(**options)).tensor
    assert tensor.format == format_name
    return tensor


def on(device, tensor):
    parts = {part: values.to(device) for part, values in tensor.parts.items()}
    return type(tensor)(tensor.format, tensor.scheme, tensor.shape, parts)


def prepared(name, tensor, device, dtype):
    """Return a backend and a weight prepared on a device; skip what the backend refuses."""
    backend = load_backend(name)
    moved = on(device, tensor)
    reason = backend.why_not(moved, torch.device(device))
    if reason is not None:
        assert reason.endswith("."), "why_not gives a sentence"
        with pytest.raises(BackendError, match=name):
            choose_backend(moved, torch.device(device), name)
        pytest.skip(f"{name}: {reason}")
    return backend, backend.prepare(moved, dtype)


def rounding_of_parameters(name, tensor, dtype):
    """Return by how much a backend may change each weight before it runs it."""
    floats = dtype != torch.float32 or name in ROUNDS_FLOAT32
    rounds = floats and tensor.format in ROUNDING.get(name, ())
    return rounding_of_steps(tensor) if rounds else torch.zeros(tensor.shape, dtype=torch.float64)


def rounding_of_tables(name, exact, x):
    """Return by how much sums of four inputs in 16 bits may change a product.

    A step is at most 4 max|x| / 32767; each of in_features / 4 sums is off by half of one, times
    the sum of a group's plane scales, which is half of what weights may span there.
    """
    if name not in TABLES:
        return 0.0
    padded = exact.shape[1] + 31
    return 1.01 * padded * x.double().abs().amax(-1, keepdim=True) * exact.abs().max() / 32767


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
    allowed = x.double().abs() @ rounding_of_parameters(name, tensor, x.dtype).T
    allowed = allowed + rounding_of_tables(name, exact, x)
    fits = error <= rounding * terms + allowed + 1e-30
    assert bool(fits.all()), f"{x.dtype}, {tuple(x.shape)}"


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_matmul_equals_the_definition_at_odd_shapes(name, device, format_name, size, group_dim):
    *shape, group_size = size
    scheme = WeightScheme(num_bits=3, group_size=group_size, group_dim=group_dim)
    tensor = solved(format_name, scheme, Shape2D(*shape), 0)
    for dtype in DTYPES:
        check_matmul(name, device, tensor, normal(5, shape[1]).to(dtype))


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_matmul_equals_the_definition_for_every_width(name, device, num_bits, symmetric):
    scheme = WeightScheme(num_bits=num_bits, group_size=64, symmetric=symmetric)
    tensor = solved("binary_coding", scheme, Shape2D(24, 320), num_bits)
    for tokens in TOKENS:
        check_matmul(name, device, tensor, normal(tokens, 320).half())


@pytest.mark.parametrize("format_name", STEPPED)
@pytest.mark.parametrize("scheme", STEPPED_SCHEMES, ids=STEPPED_NAMES)
def test_matmul_equals_the_definition_for_imported_weights(name, device, format_name, scheme):
    for tokens in (1, 3, 17):
        tensor = solved(format_name, scheme, Shape2D(40, 544), tokens)
        check_matmul(name, device, tensor, normal(tokens, 544).half())


@pytest.mark.parametrize("group_size", [32, 64, 128, 192, None])
def test_matmul_equals_the_definition_for_wide_inputs(name, device, group_size):
    scheme = WeightScheme(num_bits=3, group_size=group_size)
    tensor = solved("binary_coding", scheme, Shape2D(40, 3072), 6)
    for dtype, tokens in itertools.product(DTYPES, TOKENS):
        check_matmul(name, device, tensor, normal(tokens, 3072).to(dtype))


def test_outliers_in_the_input_do_not_drown_the_rest(name, device):
    tensor = solved("binary_coding", WeightScheme(num_bits=4), Shape2D(48, 160), 1)
    x = normal(4, 160)
    x[:, 7] = 900.0
    x[1, 100] = -1500.0
    x[2] = 0
    for dtype in DTYPES:
        check_matmul(name, device, tensor, x.to(dtype))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("scheme", QUANTIZED_INPUTS, ids=lambda scheme: f"w{scheme.num_bits}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_inputs_are_multiplied_as_defined(name, device, granularity, scheme, dtype):
    tensor = solved("affine", scheme, Shape2D(48, 136), 3)
    backend, _ = prepared(name, tensor, device, dtype)
    inputs = ActivationScheme(
        granularity=granularity, scale=0.02 if granularity == "tensor" else None
    )
    entry = LayerEntry(
        format="affine", scheme=scheme, shape=tensor.shape, method="rtn", activation=inputs
    )
    with use_backend(name):
        linear = QuantizedLinear(entry, None)
    for part, values in tensor.parts.items():
        linear.get_buffer(part).copy_(values)
    linear.to(device)
    for tokens in (1, 100):
        x = normal(2, tokens, 136, seed=tokens).to(dtype)
        codes, steps = quantize_activations(x, inputs)
        exact_weight, exact_x = dequantized(tensor, torch.float64), codes.double() * steps.double()
        got = linear(x.to(device)).cpu()
        assert got.dtype == dtype
        terms = exact_x.abs() @ exact_weight.abs().T
        error = (got.double() - exact_x @ exact_weight.T).abs()
        allowed = rounding_of_tables(name, exact_weight, exact_x) + 1e-30
        assert bool((error <= (3 * torch.finfo(dtype).eps + 2**-20) * terms + allowed).all())
    assert linear.backend is backend


def test_leading_dimensions_of_the_input_are_kept(name, device):
    tensor = solved("affine", WeightScheme(num_bits=4, group_size=32), Shape2D(12, 40), 2)
    for leading, dtype in itertools.product([(), (1,), (2, 3), (1, 1, 17), (0,)], DTYPES):
        check_matmul(name, device, tensor, normal(*leading, 40).to(dtype))


def test_strided_and_shifted_input_is_read_like_a_contiguous_one(name, device):
    tensor = solved("binary_coding", WeightScheme(num_bits=2), Shape2D(12, 40), 3)
    for dtype in DTYPES:
        check_matmul(name, device, tensor, normal(40, 9).to(dtype).T)
        moved = normal(41).to(dtype).to(device)[1:].view(1, 40)  # contiguous, and not aligned
        check_matmul(name, device, tensor, moved)


def check_rows(name, device, tensor, index, dtype):
    """Compare looked-up rows with those of W, but for a last digit of the dtype."""
    backend, table = prepared(name, tensor, device, dtype)
    got = backend.rows(index.to(device), table).cpu()
    assert got.shape == (*index.shape, tensor.shape.in_features)
    expected = dequantized(tensor, torch.float64)[index]
    error = (got.double() - expected).abs()
    rounding = 2**-22 * expected.abs().max()  # a weight is a sum in float32, or better
    rounding = rounding + 1.01 * rounding_of_parameters(name, tensor, dtype)[index]
    fits = error <= torch.finfo(dtype).eps * expected.abs() + rounding
    assert bool(fits.all()), str(dtype)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_rows_equal_the_definition(name, device, format_name, group_size, group_dim):
    scheme = WeightScheme(num_bits=3, group_size=group_size, group_dim=group_dim)
    tensor = solved(format_name, scheme, Shape2D(50, 36), 4)
    for dtype in DTYPES:
        check_rows(name, device, tensor, torch.tensor([[0, 49, 7], [7, 7, 31]]), dtype)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_of_an_input_is_a_product_with_the_weight(
    name, device, format_name, dtype, monkeypatch
):
    monkeypatch.setattr(
        differentiable, "BACKWARD_CHUNK", 7 * 36
    )  # rows in eight parts, the last is short
    tensor = solved(format_name, WeightScheme(num_bits=3, group_size=16), Shape2D(50, 36), 4)
    with torch.inference_mode():  # a model may have answered before it has adapters
        backend, weight = prepared(name, tensor, device, dtype)
    x = normal(2, 3, 36).to(device, dtype).requires_grad_()
    y = differentiable.multiply_differentiably(
        x, lambda inputs: backend.matmul(inputs, weight), (backend, weight), tensor.shape
    )
    wanted = normal(2, 3, 50, seed=1).to(device, dtype)
    y.backward(wanted)
    assert torch.equal(y.detach(), backend.matmul(x.detach(), weight))
    exact, wanted = dequantized(tensor, torch.float64), wanted.double().cpu()
    terms = wanted.abs() @ exact.abs()
    allowed = wanted.abs() @ rounding_of_parameters(name, tensor, dtype)
    assert x.grad is not None
    error = (x.grad.double().cpu() - wanted @ exact).abs()
    assert bool((error <= (9 * torch.finfo(dtype).eps + 2**-20) * terms + 2 * allowed).all())


MIXED = [[3] * 70, [4] + [2] * 69, [8, 4, 3, 2, 4] * 14, [5, 4, 3, 2, 1] * 13 + [1] * 5]
"""Bits of each row: one class, a class of one row, four and five classes."""


@pytest.mark.parametrize("row_bits", MIXED, ids=lambda bits: f"{len(set(bits))}classes")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rows_of_unlike_bits_equal_the_definition(name, device, row_bits, group_size):
    tensor = solved_mixed(normal(len(row_bits), 256), row_bits, group_size)
    for dtype in DTYPES:
        for tokens in (1, 2, 8, 17, 64):
            check_matmul(name, device, tensor, normal(tokens, 256).to(dtype))
        check_rows(name, device, tensor, torch.tensor([[0, 69, 7], [7, 1, 31]]), dtype)


def test_it_repeats_itself_and_leaves_the_input_alone(name, device):
    tensor = solved("binary_coding", WeightScheme(num_bits=3), Shape2D(200, 1000), 5)
    for dtype in DTYPES:
        backend, weight = prepared(name, tensor, device, dtype)
        for tokens in TOKENS:
            kept = normal(tokens, 1000).to(dtype)
            x = kept.clone().to(device)
            first = backend.matmul(x, weight)
            assert torch.equal(x.cpu(), kept)
            assert all(torch.equal(first, backend.matmul(x, weight)) for _ in range(5))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("counts", [(32, 16, 16), (24, 8, 8), (24, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_what_is_fused_are_the_weights(name, device, format_name, counts, dtype):
    scheme, interleave = WeightScheme(num_bits=3, group_size=32), len(counts) == 2
    tensors = [solved(format_name, scheme, Shape2D(n, 96), i) for i, n in enumerate(counts)]
    backend, _ = prepared(name, tensors[0], device, dtype)
    fused = backend.fuse([on(device, each) for each in tensors], dtype, interleave=interleave)
    if fused is None:
        assert name not in FUSING or format_name in APART
        return
    assert len(fused.parts) == len(tensors)
    x = normal(5, 96).to(dtype).to(device)
    for tensor, part in zip(tensors, fused.parts, strict=True):
        alone = backend.prepare(on(device, tensor), dtype)
        if part is not None:
            torch.testing.assert_close(backend.matmul(x, part), backend.matmul(x, alone))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_prepared_says_what_it_is(name, device, format_name, dtype):
    tensor = solved(format_name, WeightScheme(num_bits=3, group_size=32), Shape2D(24, 96), 0)
    _, weight = prepared(name, tensor, device, dtype)
    dense = weight if isinstance(weight, torch.Tensor) else weight.dense()
    expected = dequantized(tensor, torch.float64)
    error = (dense.cpu().double() - expected).abs()
    rounding = 2**-20 * expected.abs().max()
    rounding = rounding + 1.01 * rounding_of_parameters(name, tensor, dtype)
    assert bool((error <= torch.finfo(dtype).eps * expected.abs() + rounding).all())


@torch.no_grad()
def test_a_decoding_step_by_its_operations_is_that_of_the_model(name, device, checkpoint):
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else torch.float16
    with use_backend(name):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    tensor = solved("affine", WeightScheme(num_bits=3, group_size=32), Shape2D(24, 96), 0)
    backend, _ = prepared(name, tensor, device, dtype)
    ids = torch.arange(3, 23, device=device)[None]
    expected = model(ids).logits[:, 11:]
    weights = weights_of(model)
    ops = backend.decode_ops(weights)
    if ops is None:
        assert name not in (*FUSING, "reference")
        return
    runner = DecodeRunner(weights, ops, max_length=32)
    logits = [runner.prefill(ids[:, :12]).clone()]
    logits += [runner.step(tokens).clone() for tokens in ids[:, 12:].T]
    tolerance = 1e-4 if device == "cpu" else 0.03
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(model(ids).logits[:, 11:], expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", ["binary_coding", "mixed_rows"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_two_streams_and_a_replayed_graph_give_the_same(name, device, tokens, format_name):
    if device == "cpu":
        pytest.skip("streams are a card's")
    tensor = solved(format_name, WeightScheme(num_bits=3), Shape2D(1000, 2000), 5)
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
