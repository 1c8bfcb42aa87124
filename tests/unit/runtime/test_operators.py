"""What torch knows of the kernels without a card, and that a compiled model is one graph on one."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtool.runtime.backends.cuda import backend as cuda
from qtool.runtime.backends.cuda import driver, linear_kernels, operators, room, selection
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card
from qtool.runtime.backends.cuda.mixed import MixedWeight, prepare_weight
from qtool.runtime.backends.cuda.ordered import OrderedWeight
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder


def weight(device="cpu", group_dim="in_features"):
    scheme = WeightScheme(num_bits=3, group_size=32, group_dim=group_dim)
    tensor = random_tensor("binary_coding", scheme, Shape2D(48, 320), 1)
    parts = {name: part.to(device) for name, part in tensor.parts.items()}
    moved = type(tensor)(tensor.format, scheme, tensor.shape, parts)
    return tensor, linear_kernels.prepare(moved, torch.float16)


def paneled_weight(device="cpu"):
    return weight(device, "out_features")


LAYOUTS = pytest.mark.parametrize("made", [weight, paneled_weight])


@LAYOUTS
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
def test_shapes_and_dtypes_are_known_without_running(leading, made):
    _, prepared = made()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = operators.matmul_operator(torch.empty((*leading, 320), dtype=torch.float16), prepared)
        found = operators.rows_operator(torch.empty(leading, dtype=torch.int64), prepared)
    assert (y.shape, y.dtype) == ((*leading, 48), torch.float16)
    assert (found.shape, found.dtype) == ((*leading, 320), torch.float16)


MIXED_ROWS = ((8, 1), (4, 20), (3, 16), (2, 11))


def mixed_weight(device="cpu"):
    scheme = WeightScheme(num_bits=8, group_size=64, rows=MIXED_ROWS)
    tensor = random_tensor("mixed_rows", scheme, Shape2D(48, 320), 1)
    parts = {name: part.to(device) for name, part in tensor.parts.items()}
    moved = type(tensor)(tensor.format, scheme, tensor.shape, parts)
    prepared = prepare_weight(moved, torch.float16)
    assert isinstance(prepared, MixedWeight)
    return tensor, prepared


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
def test_shapes_of_rows_of_unlike_bits_are_known_without_running(leading):
    _, prepared = mixed_weight()
    x, index = torch.empty((*leading, 320), dtype=torch.float16), torch.empty(leading).long()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = operators.mixed_matmul_operator(x, prepared)
        found = operators.mixed_rows_operator(index, prepared)
    assert (y.shape, y.dtype) == ((*leading, 48), torch.float16)
    assert (found.shape, found.dtype) == ((*leading, 320), torch.float16)


@LAYOUTS
def test_operators_pass_all_that_a_weight_is(made):
    _, prepared = made()
    again = operators._weight(torch.float16, operators._flat(prepared))
    assert again.shape == prepared.shape and again.dtype == prepared.dtype
    assert again.scheme == prepared.scheme
    assert torch.equal(again.dense(), prepared.dense())


@pytest.fixture
def on_cpu(monkeypatch):
    """Run the operators on the CPU, where the kernels are emulated."""
    monkeypatch.setattr(cuda, "launch", Recorder())
    monkeypatch.setattr(cuda, "card_of", lambda _index: Card(2, 227 * 1024))
    library = torch.library.Library("qtool", "IMPL")

    def matmul(x, *flat):
        return cuda._matmul(x, operators._weight(x.dtype, flat))

    def rows(index, dtype, *flat):
        return cuda._rows(index, operators._weight(dtype, flat))

    library.impl("matmul", matmul, "CPU")
    library.impl("rows", rows, "CPU")
    yield
    library._destroy()


@LAYOUTS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.usefixtures("on_cpu")
def test_tiles_and_panels_are_multiplied_and_gathered(made, kept, compiled):
    tensor, _ = made()
    prepared = linear_kernels.prepare(tensor, torch.float16, keep_stored=kept)
    exact, x, index = (
        dequantized(tensor, torch.float64),
        normal(1, 320).half(),
        torch.tensor([3, 47]),
    )

    def run(x, index):
        return cuda.BACKEND.matmul(x, prepared), cuda.BACKEND.rows(index, prepared)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="eager")
    y, found = run(x, index)
    torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-2, atol=0.1)
    assert torch.equal(found, exact.half()[index])


@pytest.mark.parametrize("format_name", ["binary_coding", "affine", "ordered_affine"])
@pytest.mark.parametrize(("group_size", "columns"), [(8, 1280), (16, 640), (24, 448), (100, 512)])
@pytest.mark.usefixtures("on_cpu")
def test_groups_are_padded_to_what_the_kernels_take(format_name, group_size, columns):
    scheme = WeightScheme(num_bits=3, group_size=group_size)
    tensor = random_tensor(format_name, scheme, Shape2D(48, 320), 1)
    prepared = cuda.BACKEND.prepare(tensor, torch.float16)
    assert isinstance(prepared, OrderedWeight)
    assert isinstance(prepared.weight, KernelWeight)
    assert prepared.weight.shape == (48, columns)
    assert prepared.weight.tiles is not None
    exact, x, index = (
        dequantized(tensor, torch.float64),
        normal(2, 320).half(),
        torch.tensor([3, 47]),
    )
    y = cuda.BACKEND.matmul(x, prepared)
    torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-2, atol=0.1)
    assert torch.equal(prepared.placed(x, Recorder()), prepared.sorted(x))
    torch.testing.assert_close(prepared.dense().double(), exact, rtol=2e-3, atol=2e-3)
    found = cuda.BACKEND.rows(index, prepared).double()
    torch.testing.assert_close(found, exact[index], rtol=2e-3, atol=2e-3)
    packed = (prepared.weight.tiles.planes, prepared.weight.tiles.scales, prepared.order)
    assert room.card_bytes(tensor) == sum(part.nbytes for part in packed)


def test_operators_pass_all_that_rows_of_unlike_bits_are():
    _, prepared = mixed_weight()
    again = operators._mixed_weight(torch.float16, operators._flat_mixed(prepared))
    assert again.shape == prepared.shape and again.dtype == prepared.dtype
    assert [part.scheme for part in again.classes] == [part.scheme for part in prepared.classes]
    assert torch.equal(again.dense(), prepared.dense())


@pytest.mark.gpu
def test_operators_of_rows_of_unlike_bits_keep_what_they_promise():
    tensor, prepared = mixed_weight("cuda")
    flat, exact = operators._flat_mixed(prepared), dequantized(tensor, torch.float64)
    x, index = normal(2, 320).half().cuda(), torch.tensor([3, 47]).cuda()
    tests = ("test_schema", "test_faketensor")
    library = torch.ops.qtool
    torch.library.opcheck(library.mixed_matmul, (x, *flat), test_utils=tests)
    torch.library.opcheck(library.mixed_rows, (index, torch.float16, *flat), test_utils=tests)
    got = operators.mixed_matmul_operator(x, prepared).cpu().double()
    assert torch.allclose(got, x.cpu().double() @ exact.T, 1e-2, 0.1)
    assert torch.equal(
        operators.mixed_rows_operator(index, prepared).cpu(), exact.half()[index.cpu()]
    )


@pytest.mark.gpu
@LAYOUTS
def test_operators_keep_what_they_promise(made):
    tensor, prepared = made("cuda")
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
@pytest.mark.parametrize("made", [weight, paneled_weight, mixed_weight])
def test_a_compiled_function_is_one_graph_for_prefill_and_decoding(made):
    _, prepared = made("cuda")

    def layer(x):
        return torch.nn.functional.silu(cuda.BACKEND.matmul(x, prepared))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (1, 5, 40):
        x = normal(tokens, 320).half().cuda()
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_weight_that_tables_run_is_compiled_from_its_tiles(monkeypatch):
    small = replace(selection.H100, tables=range(1000, 100_000))
    monkeypatch.setattr(linear_kernels, "selection_for", lambda _: small)
    tensor, prepared = weight("cuda")
    assert prepared.stored is not None and prepared.tiles is not None
    assert linear_kernels.kernel_for(prepared, 1, driver.card_of(0)) == "lut"

    def layer(x):
        return torch.nn.functional.silu(cuda.BACKEND.matmul(x, prepared))

    compiled, exact = torch.compile(layer, fullgraph=True, dynamic=True), dequantized(tensor)
    for tokens in (1, 5):
        x = normal(tokens, 320).half().cuda()
        expected = torch.nn.functional.silu(x.cpu().float() @ exact.T)
        for got in (layer(x), compiled(x)):
            torch.testing.assert_close(got.cpu().float(), expected, rtol=1e-2, atol=0.1)
