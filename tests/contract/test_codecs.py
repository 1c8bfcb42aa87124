"""What every codec must do; an independent decoder stands in tests/golden/oracles.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qtool.formats
from qtool import plugins
from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core.packing import codes_to_planes
from qtool.errors import SchemeError
from qtool.formats._dtypes import DTYPES, dtype_of, stored_name
from qtool.formats.nested import groups_per_super
from qtool.scheme import GROUP_DIMS, BitCode, Shape2D, WeightScheme
from tests.golden.oracles import ORACLES

FORMATS = plugins.names(qtool.formats)
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)

schemes = st.builds(
    WeightScheme,
    num_bits=st.integers(1, 8),
    group_size=st.one_of(st.none(), st.integers(1, 40)),
    group_dim=st.sampled_from(GROUP_DIMS),
    symmetric=st.booleans(),
)
GROUPED = {"out_features": 0, "in_features": 1}
shapes = st.builds(Shape2D, st.integers(1, 36), st.integers(1, 36))


def with_classes(scheme: WeightScheme, shape: Shape2D, seed: int) -> WeightScheme:
    """Return a scheme of one to five classes of rows, the widest as wide as it was."""
    draw = np.random.default_rng(seed)
    most = min(4, scheme.num_bits - 1, shape.out_features - 1)
    others = draw.choice(np.arange(1, scheme.num_bits), draw.integers(0, most + 1), replace=False)
    ends = draw.choice(np.arange(1, shape.out_features), len(others), replace=False)
    counts = np.diff([0, *sorted(ends), shape.out_features]).tolist()
    bits = [scheme.num_bits, *sorted(others.tolist(), reverse=True)]
    rows = tuple(zip(bits, counts, strict=True))
    return replace(scheme, group_dim="in_features", rows=rows)


CODED = ("encrypted_planes", "sparse_planes")
"""Formats whose planes networks of XOR gates make."""


def with_code(name: str, scheme: WeightScheme, shape: Shape2D, seed: int) -> WeightScheme:
    """Return a scheme with a network, of weights of a format that has one."""
    draw = np.random.default_rng(seed)
    inputs = int(draw.integers(1, 6))
    outputs = inputs + int(draw.integers(0, 40))
    if name == "encrypted_planes":
        return replace(scheme, code=BitCode(num_inputs=inputs, num_outputs=outputs))
    scheme = replace(scheme, num_bits=min(scheme.num_bits, 4), symmetric=True)
    kept = int(draw.integers(1, shape.out_features * shape.in_features + 1))
    code = BitCode(
        num_inputs=inputs,
        num_outputs=outputs,
        registers=int(draw.integers(1, 4)),
        kept=kept,
        corrections=int(draw.integers(0, scheme.num_bits * kept + 1) // draw.integers(1, 9)),
    )
    return replace(scheme, code=code)


def random_tensor(name: str, scheme: WeightScheme, shape: Shape2D, seed: int) -> QuantizedTensor:
    """Return a weight with arbitrary bits and parameters in the layout of its format."""
    is_affine = name in ("affine", "ordered_affine")
    if is_affine and scheme.symmetric and scheme.num_bits == 1:
        scheme = WeightScheme(num_bits=2, symmetric=True, group_dim=scheme.group_dim)
    if name == "dint" and scheme.num_bits < 3:
        scheme = replace(scheme, num_bits=3)
    if name == "mixed_rows" and not scheme.rows:
        scheme = with_classes(scheme, shape, seed)
    if name == "ordered_affine":
        scheme = replace(scheme, group_dim="in_features")
    if name in CODED and scheme.code is None:
        scheme = with_code(name, scheme, shape, seed)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part, spec in codec(name).layout(scheme, shape).items():
        if spec.counts:
            numbers = [number for number, count in enumerate(spec.counts) for _ in range(count)]
            shuffled = torch.tensor(numbers)[torch.randperm(len(numbers), generator=generator)]
            width = spec.shape[0]
            drawn = codes_to_planes(shuffled.to(torch.uint8)[None], width).squeeze(1)
        elif spec.is_order:
            drawn = torch.randperm(spec.shape[0], generator=generator)
        elif spec.dtype == "int32":
            drawn = torch.randint(-(2**31), 2**31, spec.shape, generator=generator)
        else:  # few bits: sums of them are exact in float64 and float32
            drawn = torch.randint(-64, 65, spec.shape, generator=generator) / 32
        parts[part] = drawn.to(dtype_of(spec.dtype))
    return QuantizedTensor(name, scheme, shape, parts)


def test_every_format_has_an_independent_decoder():
    assert set(ORACLES) == set(FORMATS)


@EVERY_FORMAT
@settings(max_examples=25)
@given(scheme=schemes, shape=shapes, seed=st.integers(0, 10_000))
def test_dequantize_equals_the_independent_decoder(name, scheme, shape, seed):
    tensor = random_tensor(name, scheme, shape, seed)
    scheme = tensor.scheme
    parts = {part: values.numpy() for part, values in tensor.parts.items()}
    size = shape.out_features, shape.in_features
    decode = ORACLES[name]
    expected = decode(parts, scheme.num_bits, *size, scheme.group_size, scheme.group_dim)
    for dtype in (torch.float64, torch.float32):
        weight = codec(name).dequantize(tensor, dtype)
        assert weight.dtype == dtype
        assert np.array_equal(weight.double().numpy(), expected)


@EVERY_FORMAT
@given(scheme=schemes, shape=shapes)
def test_layout_has_whole_positive_sizes_and_known_dtypes(name, scheme, shape):
    impossible = name == "dint" and scheme.num_bits < 3
    impossible |= name == "ordered_affine" and scheme.group_dim == "out_features"
    is_affine = name in ("affine", "ordered_affine")
    if impossible or (is_affine and scheme.symmetric and scheme.num_bits == 1):
        with pytest.raises(SchemeError):
            codec(name).layout(scheme, shape)
        return
    if name == "mixed_rows":
        scheme = with_classes(scheme, shape, 0)
    if name in CODED:
        with pytest.raises(SchemeError, match="code of"):
            codec(name).layout(scheme, shape)
        scheme = with_code(name, scheme, shape, 0)
    layout = codec(name).layout(scheme, shape)
    assert layout
    for spec in layout.values():
        assert stored_name(spec.dtype) in DTYPES
        assert all(type(size) is int and size > 0 for size in spec.shape)


@EVERY_FORMAT
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_dequantize_leaves_the_parts_alone(name, group_dim):
    scheme = WeightScheme(num_bits=3, group_size=8, group_dim=group_dim)  # if the format has it
    tensor = random_tensor(name, scheme, Shape2D(20, 36), 0)
    before = {part: values.clone() for part, values in tensor.parts.items()}
    codec(name).dequantize(tensor, torch.float32).add_(1)
    for part, values in before.items():
        assert torch.equal(tensor.parts[part], values)


@pytest.mark.parametrize("name", ["affine", "binary_coding"])
@pytest.mark.parametrize("num_bits", range(2, 8))
def test_size_is_the_bits_and_what_the_scales_take(name, num_bits):
    shape = Shape2D(128, 256)
    scheme = WeightScheme(num_bits=num_bits, group_size=128)
    layout = codec(name).layout(scheme, shape)
    size = sum(np.prod(spec.shape) * dtype_of(spec.dtype).itemsize for spec in layout.values())
    per_group = {"affine": 16 + num_bits, "binary_coding": 16 * (num_bits + 1)}[name]
    assert 8 * size / (128 * 256) == pytest.approx(num_bits + per_group / 128)


def check_is(tensor: QuantizedTensor, expected: torch.Tensor) -> None:
    """Compare with a weight in float64, to the bit; the parts must be those of the format."""
    specs = codec(tensor.format).layout(tensor.scheme, tensor.shape)
    for name, spec in specs.items():
        part = tensor.parts[name]
        assert (tuple(part.shape), part.dtype) == (spec.shape, dtype_of(spec.dtype))
        assert part.is_contiguous()
    assert tensor.parts.keys() == specs.keys()
    assert torch.equal(codec(tensor.format).dequantize(tensor, torch.float64), expected)


@EVERY_FORMAT
@settings(max_examples=60)
@given(
    scheme=schemes,
    other=st.integers(1, 36),
    dim=st.integers(0, 1),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
)
def test_weights_are_joined_to_the_bit_or_refused(name, scheme, other, dim, lengths, seed):
    made = [Shape2D(length, other) if dim == 0 else Shape2D(other, length) for length in lengths]
    tensors = [random_tensor(name, scheme, shape, seed + i) for i, shape in enumerate(made)]
    size, grouped = tensors[0].scheme.group_size, dim == GROUPED[tensors[0].scheme.group_dim]
    if name == "nested" and size:
        size *= groups_per_super(tensors[0].scheme)
    if grouped and len(lengths) > 1 and (size is None or any(n % size for n in lengths[:-1])):
        with pytest.raises(SchemeError, match="Only the last"):
            codec(name).cat(tensors, dim)
        return
    if name == "mixed_rows" and dim == 1 and len(lengths) > 1:
        with pytest.raises(SchemeError, match="Put them below one another"):
            codec(name).cat(tensors, dim)
        return
    if name == "ordered_affine" and dim == 0:
        orders = [each.parts["input_order"] for each in tensors]
        if not all(torch.equal(order, orders[0]) for order in orders):
            with pytest.raises(SchemeError, match="sorted in another order"):
                codec(name).cat(tensors, dim)
            return
    exact = [codec(name).dequantize(each, torch.float64) for each in tensors]
    check_is(codec(name).cat(tensors, dim), torch.cat(exact, dim))


@EVERY_FORMAT
def test_weights_that_differ_are_not_joined(name):
    one, other = (
        random_tensor(name, WeightScheme(num_bits=3, group_size=size), Shape2D(16, 16), 0)
        for size in (4, 8)
    )
    wider = random_tensor(name, one.scheme, Shape2D(16, 24), 0)
    more = random_tensor(name, replace(one.scheme, num_bits=4, rows=()), Shape2D(16, 16), 0)
    for pair in ([one, other], [one, wider], [one, more]):
        if name == "mixed_rows" and pair[1] is more:
            continue  # bits are what its rows may differ in
        with pytest.raises(SchemeError, match="don't make one"):
            codec(name).cat(pair, 0)


@EVERY_FORMAT
@settings(max_examples=60)
@given(scheme=schemes, shape=shapes, dim=st.integers(0, 1), data=st.data())
def test_a_part_of_a_weight_is_that_to_the_bit_or_refused(name, scheme, shape, dim, data):
    tensor = random_tensor(name, scheme, shape, data.draw(st.integers(0, 10_000)))
    start = data.draw(st.integers(0, shape[dim] - 1))
    length = data.draw(st.integers(1, shape[dim] - start))
    sizes, first = [tensor.scheme.group_size or shape[dim]], start
    if name == "nested":
        sizes.append(sizes[0] * groups_per_super(tensor.scheme))
    if name == "ordered_affine" and dim == 1:
        order = tensor.parts["input_order"].tolist()
        first = min(order.index(place) for place in range(start, start + length))
        if sorted(order[first : first + length]) != list(range(start, start + length)):
            with pytest.raises(SchemeError, match="aren't neighbours"):
                codec(name).narrow(tensor, dim, start, length)
            return
    cut = any(first % size and first % size + length > size for size in sizes)
    if dim == GROUPED[tensor.scheme.group_dim] and cut:
        with pytest.raises(SchemeError, match="begin within a group"):
            codec(name).narrow(tensor, dim, start, length)
        return
    exact = codec(name).dequantize(tensor, torch.float64)
    check_is(codec(name).narrow(tensor, dim, start, length), exact.narrow(dim, start, length))


@EVERY_FORMAT
@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 17), (16, 1), (3, 0)])
def test_a_part_that_a_weight_does_not_have_is_refused(name, start, length):
    tensor = random_tensor(name, WeightScheme(num_bits=3, group_size=4), Shape2D(16, 16), 0)
    for dim in (0, 1):
        with pytest.raises(SchemeError, match="has no part"):
            codec(name).narrow(tensor, dim, start, length)


@EVERY_FORMAT
def test_version_is_a_positive_number(name):
    assert codec(name).version >= 1
