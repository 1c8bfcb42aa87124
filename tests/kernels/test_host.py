"""Every kernel's own text, run on the CPU, against the definition of the format in float64."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from qtool.base import QuantizedTensor
from qtool.core import grouping
from qtool.core.packing import unpack_bits
from qtool.formats import binary_coding
from qtool.runtime.backends.cuda import planes, splits, tiles
from qtool.runtime.decode.torch_ops import rms_norm
from qtool.scheme import Shape2D, WeightScheme
from tests.helpers import dequantized
from tests.kernels.host import Recorder, host_kernels

THREADS = 256
EPS = 1e-5
BEFORE_CAST = 1e-6
AFTER_CAST = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    num_bits: int
    shape: tuple[int, int]
    group_size: int | None
    batch: int = 1
    splits: int = 1
    symmetric: bool = False
    dtype: torch.dtype = torch.float16
    outliers: float = 1.0
    group_dim: str = "in_features"

    def weight(self) -> QuantizedTensor:
        generator = torch.Generator().manual_seed(self.num_bits)
        shape = Shape2D(*self.shape)
        scheme = WeightScheme(
            num_bits=self.num_bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            group_dim=self.group_dim,  # type: ignore[arg-type]
        )
        rows = grouping.to_rows(torch.zeros(shape), scheme)
        codes = torch.randint(0, 2**self.num_bits, rows.shape, generator=generator)
        groups = scheme.num_groups(shape)
        scales = torch.rand(len(rows), groups, self.num_bits, generator=generator) + 0.1
        offsets = torch.randn(len(rows), groups, generator=generator)
        return binary_coding.encode_binary(
            grouping.split(codes.to(torch.uint8), self.group_size),
            scales.sort(-1, descending=True).values.half(),
            offsets.half(),
            scheme,
            shape,
        )

    def inputs(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.batch)
        x = torch.randn(self.batch, self.shape[1], generator=generator)
        x[:, ::37] *= self.outliers
        return x.to(self.dtype).contiguous()

    def constants(self, **more: int) -> tuple[tuple[str, int], ...]:
        inputs = self.shape[1]
        whole = -(-inputs // tiles.UNIT) * tiles.UNIT
        values = {"PLANES": self.num_bits, "GROUP": self.group_size or whole, **more}
        values["OFFSET"] = int(not self.symmetric)
        if self.dtype == torch.bfloat16:
            values["ACTIVATION_BF16"] = 1
        return tuple(sorted(values.items()))

    def layout(self) -> planes.Layout:
        values = dict(self.constants())
        return planes.Layout(values["PLANES"], values["GROUP"], values["OFFSET"])

    def output(self) -> torch.Tensor:
        """Return where a kernel writes: poisoned, so that what it leaves out shows."""
        return torch.full((self.batch, self.shape[0]), torch.nan).to(self.dtype)


def error(got, case: Case, tensor: QuantizedTensor) -> float:
    expected = case.inputs().double() @ dequantized(tensor, torch.float64).T
    return float((got.double() - expected).norm() / expected.norm())


CASES = [
    Case(3, (40, 256), 64),
    Case(2, (33, 576), 192, batch=3, splits=2),
    Case(4, (16, 1536), 128, batch=8, splits=3, outliers=300),
    Case(1, (16, 300), 32, batch=9),
    Case(3, (20, 700), None, batch=2, splits=2, dtype=torch.bfloat16, outliers=300),
    Case(8, (16, 256), 96, symmetric=True),
    Case(5, (7, 520), 256, symmetric=True, dtype=torch.bfloat16),
    Case(2, (16, 1024), 512, batch=5, splits=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_loses_nothing(case):
    tensor = case.weight()
    rows, inputs = case.shape
    bits = tiles.unpack_planes(tiles.pack(tensor).planes)
    assert bits.shape == (case.num_bits, -(-rows // 16) * 16, -(-inputs // 256) * 256)
    stored = unpack_bits(tensor.parts["bit_planes"], inputs)
    assert torch.equal(bits[:, :rows, :inputs], stored)
    assert not bool(bits[:, rows:].any()) and not bool(bits[:, :, inputs:].any())


def multiply(
    case, packed, x, y, partial, product, *, ctas, slabs, warps, stages, whole=0, norm=None, **more
):
    """Launch one grid, whatever would be chosen."""
    columns, layout = product.columns, case.layout()
    row_tiles, units = packed.planes.shape[:2]
    per_slab, blocks = -(-units // slabs), -(-case.batch // columns)
    grid = {"WARPS": warps, "STAGES": stages, "BLOCKS": 1, "COLUMNS": columns}
    aligned = int(case.shape[1] % 8 == 0)
    constants = case.constants(
        **grid,
        EPILOGUE=0,
        LOADS=1 + warps % 4,
        ALIGNED=aligned,
        WHOLE=whole,
        NORM=0 if norm is None else -(-units * columns // warps),
        **more,
    )
    beside = 0 if product.unscaled else 4
    x_bytes = per_slab * columns * (8 * (product.x_bytes + beside) + beside)
    parts = (row_tiles + 2 * warps) * 16 * columns * 4 + row_tiles * 4
    exchange = torch.zeros(blocks * slabs * ctas * warps * 16 * columns, dtype=torch.int64)
    host_kernels(product.name, constants)[product.name](
        (ctas, slabs, blocks),
        warps * 32,
        warps * stages * layout.stage_bytes + x_bytes + parts,
        *(packed.planes, packed.scales, x, None, y, None, partial, norm, exchange),
        *(case.shape[0], case.shape[1], case.batch),
        *(row_tiles, units, packed.scales.shape[1], case.shape[0], per_slab),
        EPS,
    )
    assert not bool(exchange.any())


GRIDS = [(1, 2, 2), (3, 4, 3), (5, 7, 2)]  # CTAs, warps, stages
FLOATS = planes.Product("bit_plane_mma", 8, 64)
BYTES = planes.Product("bit_plane_imma", 2, 128)
BITS = planes.Product("bit_plane_bmma", 1, 136, unscaled=True)
PRODUCTS = {"floats": FLOATS, "bytes": BYTES, "bits": BITS}
LEAST_GROUPS = {FLOATS.name: 32, BYTES.name: 64, BITS.name: 128}
"""Inputs of one instruction or more: groups are multiples of them."""


# What is chosen for a case on every grid; every product on one grid per case, and on all of them.
LAUNCHES = [
    *itertools.product(["chosen"], GRIDS, CASES),
    *((product, GRIDS[n % 3], case) for product in PRODUCTS for n, case in enumerate(CASES)),
    ("bits", GRIDS[1], Case(1, (33, 901), 384, batch=2)),
    ("bits", GRIDS[2], Case(3, (20, 1280), 640, dtype=torch.bfloat16, outliers=300)),
]


@pytest.mark.parametrize(("product", "grid", "case"), LAUNCHES, ids=str)
def test_bit_planes_agree_before_and_after_the_cast(case, grid, product):
    chosen = PRODUCTS.get(product) or planes.each_plane(case.batch, case.layout())
    if case.layout().group % LEAST_GROUPS[chosen.name] != 0:
        pytest.skip("what is multiplied at once would be of more than one group")
    tensor = case.weight()
    packed, x, y = tiles.pack(tensor), case.inputs(), case.output()
    row_tiles, units = packed.planes.shape[:2]
    padded = row_tiles * tiles.TILE_ROWS
    partial = torch.full((case.splits, case.batch, padded), torch.nan)
    sizes = {"ctas": min(grid[0], row_tiles * (units // case.splits)), "slabs": case.splits}
    sizes |= {"warps": grid[1], "stages": grid[2]}
    for target in (partial, None) if case.splits == 1 else (partial,):
        multiply(case, packed, x, y, target, chosen, **sizes)
    assert error(partial.sum(0)[:, : case.shape[0]], case, tensor) < BEFORE_CAST
    if case.splits > 1:
        splits.add_splits(partial, planes.Target(y), Recorder())
    assert error(y, case, tensor) < AFTER_CAST[case.dtype]


@pytest.mark.parametrize("dtype", AFTER_CAST)
@pytest.mark.parametrize(
    ("product", "columns"), [("bytes", 1), ("bytes", 2), ("floats", 1), ("bits", 1)]
)
@pytest.mark.parametrize("warps", [2, 3])
def test_a_norm_is_that_of_its_own_kernel(product, columns, dtype, warps):
    group = max(64, LEAST_GROUPS[PRODUCTS[product].name])
    case = Case(2, (24, 700), group, batch=columns, dtype=dtype)
    x, packed, y = 3 * case.inputs(), tiles.pack(case.weight()), case.output()
    norm = (torch.rand(700, generator=torch.Generator().manual_seed(3)) + 0.5).to(dtype)
    by = replace(PRODUCTS[product], columns=columns)
    sizes = {"ctas": 2, "slabs": 1, "warps": warps, "stages": 2}
    multiply(case, packed, x, y, None, by, **sizes, norm=norm)
    alone = case.output()
    multiply(case, packed, rms_norm(x, norm, EPS), alone, None, by, **sizes)
    assert float((y.double() - alone.double()).norm() / alone.double().norm()) < AFTER_CAST[dtype]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("early", "stages"), [(0, 2), (1, 3), (1, 4), (0, 4)])
@pytest.mark.parametrize(("ctas", "warps", "whole"), [(2, 2, 1), (3, 7, 0)])  # units for 3 warps
def test_when_weights_are_asked_for_changes_no_bit(ctas, warps, whole, early, stages, normed):
    case = Case(2, (57, 700), 64, batch=2)
    x, packed = case.inputs(), tiles.pack(case.weight())
    norm = torch.linspace(0.5, 1.5, 700).half() if normed else None
    sizes = {"ctas": ctas, "slabs": 1, "warps": warps, "stages": stages, "whole": whole}
    first, late = case.output(), case.output()
    multiply(case, packed, x, first, None, BYTES, **sizes, norm=norm)
    multiply(case, packed, x, late, None, BYTES, **sizes, norm=norm, EARLY=early)
    assert torch.equal(first, late)
    if not normed:
        assert error(late, case, case.weight()) < AFTER_CAST[case.dtype]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("batch", "slabs"), [(1, 1), (2, 1), (1, 2)])
def test_shares_of_whole_tiles_agree(grid, product, batch, slabs):
    case = Case(3, (57, 700), max(64, LEAST_GROUPS[PRODUCTS[product].name]), batch=batch)
    tensor, y = case.weight(), case.output()
    packed, (ctas, warps, stages) = tiles.pack(tensor), grid
    ctas, x = min(ctas, len(packed.planes)), case.inputs()
    partial = torch.full((slabs, batch, len(packed.planes) * 16), float("nan"))
    sizes = {"ctas": ctas, "slabs": slabs, "warps": warps, "stages": stages}
    given = partial if slabs > 1 else None
    multiply(case, packed, x, y, given, PRODUCTS[product], **sizes, whole=1)
    if slabs > 1:
        y = partial.sum(0)[:, : case.shape[0]]
    assert error(y, case, tensor) < AFTER_CAST[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequantize_and_gather_give_the_rounded_definition(case):
    tensor = case.weight()
    packed = tiles.pack(tensor)
    kernels = host_kernels("dequantize", case.constants())
    rows, inputs = case.shape
    row_tiles, units = packed.planes.shape[:2]
    groups = packed.scales.shape[1]
    weight = torch.full((rows, inputs), torch.nan).to(case.dtype)
    kernels["dequantize"](
        (-(-row_tiles * units // 4), 1, 1),
        128,
        0,
        *(packed.planes, packed.scales, weight),
        *(rows, inputs, row_tiles, units, groups),
    )
    expected = dequantized(tensor).to(case.dtype)
    assert torch.equal(weight, expected)
    index = torch.tensor([rows - 1, 0, rows // 2, rows, -1])
    found = torch.zeros(5, inputs).to(case.dtype)
    tensors = (packed.planes, packed.scales, index, None, found)
    kernels["gather_rows"]((5, 1, 1), 128, 0, *tensors, rows, inputs, units, groups, 0, rows)
    assert torch.equal(found[:3], expected[index[:3]])
    assert bool(found[3:].isnan().all()), "a row that isn't there is no number"


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        Case(3, (40, 70), 16, group_dim="out_features"),
        Case(2, (33, 96), None, batch=2, group_dim="out_features", symmetric=True),
    ],
    ids=str,
)
def test_sign_flip_agrees(case):
    tensor = case.weight()
    parts, y = tensor.parts, case.output()
    bf16 = (("ACTIVATION_BF16", 1),) if case.dtype == torch.bfloat16 else ()
    kernel = host_kernels("sign_flip", bf16)["sign_flip"]
    rows, inputs = case.shape
    along = case.group_dim == "in_features"
    length = inputs if along else rows
    kernel(
        (-(-rows // 8), case.batch, 1),
        THREADS,
        0,
        *(parts["bit_planes"], parts["plane_scales"], parts.get("plane_offsets"), case.inputs(), y),
        *(rows, inputs, parts["bit_planes"].shape[2], case.num_bits),
        *(case.group_size or length, tensor.scheme.num_groups(Shape2D(*case.shape)), 0, int(along)),
    )
    assert error(y, case, tensor) < AFTER_CAST[case.dtype]


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_infinite_and_missing_numbers_reach_the_output(product):
    case = Case(2, (16, 256), 128, batch=3)
    packed, y, x = tiles.pack(case.weight()), case.output(), case.inputs()
    x[0, 5], x[1, 9], x[2] = torch.inf, torch.nan, 0
    multiply(case, packed, x, y, None, product, ctas=1, slabs=1, warps=2, stages=2)
    assert not bool(torch.isfinite(y[:2]).any())
    assert torch.equal(y[2], torch.zeros(16, dtype=torch.float16))


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("group", [64, 128, 192, 256, 512])
@pytest.mark.parametrize("dtype", AFTER_CAST)
def test_inputs_that_are_all_as_large_as_can_be_do_not_overflow(product, group, dtype):
    if group % LEAST_GROUPS[product.name]:
        pytest.skip("what is multiplied at once would be of more than one group")
    case = Case(2, (16, 1024), group, batch=2, dtype=dtype)
    tensor, x, y = case.weight(), case.inputs(), case.output()
    # The largest below a power of two: nothing is closer to the end of what an integer can hold.
    x[0], x[1] = 2 - torch.finfo(dtype).eps, torch.finfo(dtype).eps / 2 - 1
    partial = torch.full((1, 2, 16), torch.nan)
    sizes = {"ctas": 1, "slabs": 1, "warps": 2, "stages": 2}
    multiply(case, tiles.pack(tensor), x, y, partial, product, **sizes)
    expected = x.double() @ dequantized(tensor, torch.float64).T
    terms = x.double().abs() @ dequantized(tensor, torch.float64).abs().T
    assert bool(((partial[0].double() - expected).abs() < BEFORE_CAST * terms).all())


@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize(("batch", "offset"), [(3, True), (7, False)])
def test_more_tokens_as_bytes_agree(columns, batch, offset):
    case = Case(3, (57, 700), 64, batch=batch, symmetric=not offset)
    tensor, x, y = case.weight(), case.inputs(), case.output()
    packed, by = tiles.pack(tensor), replace(BYTES, columns=columns)
    partial = torch.full((1, batch, len(packed.planes) * 16), torch.nan)
    for target in (partial, None):
        multiply(case, packed, x, y, target, by, ctas=3, slabs=1, warps=4, stages=3)
    assert error(partial.sum(0)[:, :57], case, tensor) < BEFORE_CAST
    assert error(y, case, tensor) < AFTER_CAST[case.dtype]
