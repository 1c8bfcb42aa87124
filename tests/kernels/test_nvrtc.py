"""Every kernel compiles for every card that is promised, and keeps its values in registers."""

import pytest

from qtool.runtime.sources import kernel_names, kernel_source
from tests.kernels.nvrtc import compile_for

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90"]
WEIGHT = {"GROUP": 128, "OFFSET": 1}
# Constants of each kernel, and how many registers leave two blocks on a multiprocessor.
VARIANTS: list[tuple[str, dict[str, int], int]] = [
    *(
        ("bit_plane_mma", {**WEIGHT, "PLANES": planes, "COLUMNS": columns}, 128)
        for planes in (1, 2, 3, 4)
        for columns in (1, 8)
    ),
    ("bit_plane_mma", {"GROUP": 192, "OFFSET": 0, "PLANES": 3, "COLUMNS": 1}, 128),
    ("bit_plane_mma", {**WEIGHT, "PLANES": 8, "COLUMNS": 8, "ACTIVATION_BF16": 1}, 255),
    *(("dequantize", {**WEIGHT, "PLANES": planes}, 128) for planes in (2, 4)),
    ("dequantize", {**WEIGHT, "PLANES": 8, "ACTIVATION_BF16": 1}, 255),
    *(("lut_gemm", {**WEIGHT, "PLANES": planes, "TILE": 128}, 128) for planes in (2, 3, 4)),
    ("sign_flip", {}, 128),
    ("add_splits", {"ACTIVATION_BF16": 1}, 128),
]


def describe(variant) -> str:
    name, constants, _ = variant
    return "-".join([name, *(f"{key}{value}" for key, value in constants.items())])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS, ids=describe)
def test_kernel_compiles_without_spilling(variant, architecture):
    name, constants, registers = variant
    compiled = compile_for(architecture, kernel_source(name, constants))
    assert compiled.cubin_bytes > 0
    assert compiled.spilled == 0
    assert compiled.registers <= registers


def test_every_kernel_has_a_variant_here():
    assert {name for name, _, _ in VARIANTS} == set(kernel_names())
