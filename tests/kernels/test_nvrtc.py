"""Every kernel compiles for every card that is promised, and keeps its values in registers."""

import math

import pytest

from qtool import resources
from qtool.runtime.backends.cuda.planes import PLAIN_LAUNCH
from qtool.runtime.backends.cuda.sources import kernel_source
from tests.kernels.nvrtc import compile_for

MEASURED, OLDEST = "sm_90", "sm_80"
NOT_TIMED = ("sm_100", "sm_120")
BETWEEN = ("sm_86", "sm_89")
SIZES = ("PLANES", "COLUMNS", "HEAD_DIM", "HEADS", "CLASSES", "ROWS", "RANKS", "INPUTS")
"""Constants that registers go with."""
WEIGHT = {"GROUP": 128, "OFFSET": 1}
AFFINE = {"GROUP": 128, "OFFSET": 2}
GRID = {"WARPS": 16, "STAGES": 3, "BLOCKS": 1, "EPILOGUE": 0, "ALIGNED": 1, **PLAIN_LAUNCH}
NORMED = {"WHOLE": 1, "LOADS": 1, "EPILOGUE": 2}
LATE = {**GRID, "STAGES": 4, "WHOLE": 1, "EARLY": 1}
PAIR = {**GRID, "WARPS": 8, "STAGES": 4, "BLOCKS": 2}
ALONE = {**PAIR, "BLOCKS": 1}
PANELS = {**GRID, "OFFSET": 1, "TILES": 8, "SETS": 1, "WHOLE": 1, "CHUNK": 8, "NORM": 0}
TABLES = {"INPUTS": 14336, "KEYS": 4, "THREADS": 1024}
SMALL_TABLES = {"INPUTS": 1000, "KEYS": 2, "THREADS": 512, "OFFSET": 0}
HEADS = {"BLOCKS": 1, "QK_NORM": 0, "SHORTEST": 64, "INT8_CACHE": 0}
HEADS |= {"BULK": 0, "WARPS": 8, "TILES": 1, "STAGES": 3, "RESIDENT": 1}


def classes_of(bits: tuple[int, ...], columns: int, grid: dict[str, int], **more: int):
    """Return the constants of a launch of several classes of rows."""
    shared = {name: value for name, value in grid.items() if name != "STAGES"}
    own = {"PLANES": bits, "OFFSET": [1] * len(bits), "STAGES": [grid["STAGES"]] * len(bits)}
    each = {f"{name}_{n}": value for name, values in own.items() for n, value in enumerate(values)}
    kind = {"GROUP": 128, "CLASSES": len(bits), "BYTES": int(columns <= 4), "COLUMNS": columns}
    return {**shared, **kind, **each, **more}


# Constants of each kernel, and how many registers leave two blocks on a multiprocessor.
VARIANTS: list[tuple[str, dict[str, int], int]] = [
    *(
        ("bit_plane_mma", {**WEIGHT, **GRID, "PLANES": planes, "COLUMNS": columns}, 128)
        for planes in (1, 2, 3, 4)
        for columns in (1, 8)
    ),
    ("bit_plane_mma", {**WEIGHT, **ALONE, "PLANES": 4, "COLUMNS": 16, "EPILOGUE": 2}, 255),
    ("bit_plane_mma", {**GRID, "GROUP": 192, "OFFSET": 0, "PLANES": 3, "COLUMNS": 1}, 128),
    ("bit_plane_mma", {**WEIGHT, **ALONE, "PLANES": 8, "COLUMNS": 8, "ACTIVATION_BF16": 1}, 255),
    *(
        ("bit_plane_imma", {**WEIGHT, **grid, "PLANES": planes, "COLUMNS": columns}, 128)
        for planes, columns in ((1, 1), (2, 2), (3, 1), (4, 1))
        for grid in (PAIR, GRID)
    ),
    ("bit_plane_bmma", {**WEIGHT, **PAIR, "PLANES": 1, "COLUMNS": 1}, 128),
    *(
        ("bit_plane_bmma", {**WEIGHT, **GRID, "PLANES": p, "COLUMNS": 1, **more}, 128)
        for p, more in (
            (3, {"WHOLE": 1, "STAGES": 2, "EARLY": 1}),
            (4, {**NORMED, "NORM": 1}),
            (4, {**NORMED, "NORM": 4, "ACTIVATION_BF16": 1}),
            (4, {"GROUP": 384, "OFFSET": 0}),
            (4, {"GROUP": 4096, "ALIGNED": 0}),
        )
    ),
    ("bit_plane_imma", {**WEIGHT, **GRID, "PLANES": 4, "COLUMNS": 2, "EPILOGUE": 2}, 128),
    ("bit_plane_imma", {**WEIGHT, **GRID, "PLANES": 2, "COLUMNS": 4, "WHOLE": 1}, 128),
    ("bit_plane_imma", {**GRID, "GROUP": 192, "OFFSET": 0, "PLANES": 3, "COLUMNS": 2}, 128),
    *(("bit_plane_imma", {**WEIGHT, **GRID, "PLANES": p, "COLUMNS": 4}, 128) for p in (3, 4)),
    *(
        ("bit_plane_imma", {**WEIGHT, **GRID, **NORMED, "PLANES": 4, "COLUMNS": n, "NORM": n}, 128)
        for n in (1, 2)
    ),
    *(
        ("bit_plane_imma", {**kind, **LATE, **more, "PLANES": 4, "COLUMNS": n}, 128)
        for kind in (WEIGHT, AFFINE)
        for n, more in ((1, {"LOADS": 4}), (2, {**NORMED, "NORM": 2}))
    ),
    ("bit_plane_mma", {**WEIGHT, **GRID, **NORMED, "PLANES": 4, "COLUMNS": 1, "NORM": 4}, 128),
    ("bit_plane_imma_experts", {**WEIGHT, **PAIR, "PLANES": 4, "COLUMNS": 1}, 128),
    *(
        ("bit_plane_imma_ranks", {**WEIGHT, **GRID, "PLANES": p, "COLUMNS": n, "RANKS": r}, 128)
        for p, n, r in ((3, 1, 2), (4, 2, 2), (3, 1, 8), (3, 4, 2))
    ),
    (
        "bit_plane_mma_ranks",
        {**WEIGHT, **GRID, "PLANES": 3, "COLUMNS": 8, "EPILOGUE": 1, "RANKS": 2},
        128,
    ),
    *(
        (name, {**WEIGHT, **GRID, "PLANES": planes, "COLUMNS": columns, **more}, 128)
        for name, planes, columns, more in (
            ("bit_plane_lookup_mma", 3, 8, {"WHOLE": 1}),
            ("bit_plane_lookup_mma", 2, 16, {"EPILOGUE": 2}),
            ("bit_plane_lookup_mma", 4, 16, {"ACTIVATION_BF16": 1}),
            ("bit_plane_lookup_mma", 4, 24, {"EPILOGUE": 1}),
            ("bit_plane_lookup_mma", 3, 8, {"GROUP": 96, "OFFSET": 0}),
            ("bit_plane_lookup_mma_ranks", 4, 8, {"RANKS": 2}),
        )
    ),
    ("bit_plane_mma_experts", {**WEIGHT, **GRID, "PLANES": 3, "COLUMNS": 1}, 128),
    *(
        (name, {**AFFINE, **GRID, "PLANES": planes, "COLUMNS": columns, **more}, most)
        for name, planes, columns, most, more in (
            ("bit_plane_codes_mma", 3, 8, 128, {"WHOLE": 1}),
            ("bit_plane_codes_mma", 2, 16, 128, {"EPILOGUE": 2}),
            ("bit_plane_codes_mma", 4, 24, 168, {"ACTIVATION_BF16": 1, "WARPS": 12}),
            ("bit_plane_codes_mma", 8, 16, 168, {"GROUP": 32, "WARPS": 12}),
            ("bit_plane_codes_mma", 4, 1, 128, {**NORMED, "GROUP": 32, "NORM": 1}),
            ("bit_plane_codes_mma_ranks", 4, 8, 128, {"RANKS": 2}),
            ("bit_plane_codes_mma_experts", 4, 1, 128, {"GROUP": 96}),
        )
    ),
    ("bit_plane_classes", classes_of((4, 3, 2, 1), 1, PAIR), 128),
    ("bit_plane_classes", classes_of((4, 2), 1, GRID), 128),
    ("bit_plane_classes", classes_of((8, 4, 3), 1, ALONE, ACTIVATION_BF16=1), 255),
    ("bit_plane_classes", classes_of((3, 2), 4, GRID), 128),
    ("bit_plane_classes", classes_of((3, 2), 8, GRID), 128),
    *(
        ("bit_panel_imma", {**PANELS, "PLANES": planes, "COLUMNS": columns, **more}, 128)
        for planes, columns, more in (
            *((planes, 1, {"NORM": 1}) for planes in (2, 3, 4)),
            (4, 1, {"SETS": 2, "EPILOGUE": 2}),
            (4, 1, {"WHOLE": 0, "NORM": 1}),
            (2, 2, {"OFFSET": 2, "TILES": 7, "CHUNK": 2, "ACTIVATION_BF16": 1}),
        )
    ),
    *(
        ("bit_panel_tiles", {**PANELS, "PLANES": planes, "COLUMNS": columns, **more}, most)
        for planes, columns, most, more in (
            (3, 1, 128, {"NORM": 1}),
            (3, 2, 168, {"WARPS": 12, "SETS": 2, "EPILOGUE": 2, "ACTIVATION_BF16": 1}),
        )
    ),
    *(
        ("bit_panel_mma", {**PANELS, "PLANES": planes, "COLUMNS": columns, **more}, most)
        for planes, columns, most, more in (
            (2, 8, 128, {}),
            (3, 16, 168, {"WARPS": 12, "ACTIVATION_BF16": 1, "CHUNK": 2}),
            (4, 8, 168, {"WARPS": 12, "WHOLE": 0}),
            (4, 16, 255, {"WARPS": 8, "SETS": 2, "EPILOGUE": 2}),
            (8, 16, 255, {"WARPS": 8, "OFFSET": 2}),
        )
    ),
    ("bit_panel_imma", {**PANELS, "PLANES": 4, "COLUMNS": 2, "WARPS": 12}, 168),
    ("panel_dequantize", {"PLANES": 3, "OFFSET": 1, "TILES": 8, "SETS": 2}, 128),
    ("panel_dequantize", {"PLANES": 8, "OFFSET": 2, "TILES": 3, "SETS": 1}, 255),
    *(("dequantize", {**WEIGHT, "PLANES": planes}, 128) for planes in (2, 4)),
    ("dequantize", {**WEIGHT, "PLANES": 8, "ACTIVATION_BF16": 1}, 255),
    *(
        ("lut_gemm", {**WEIGHT, **TABLES, "PLANES": planes, "ROWS": rows}, 64)
        for planes, rows in ((1, 8), (2, 4), (3, 4), (4, 2), (5, 2), (7, 2), (8, 1))
    ),
    (
        "lut_gemm",
        {**SMALL_TABLES, "GROUP": 1000, "PLANES": 4, "ROWS": 4, "ACTIVATION_BF16": 1},
        128,
    ),
    *(("bit_plane_imma", {**AFFINE, **PAIR, "PLANES": 4, "COLUMNS": n}, 128) for n in (1, 2)),
    *(("bit_plane_imma", {**AFFINE, **GRID, "PLANES": p, "COLUMNS": 4}, 128) for p in (2, 3)),
    ("bit_plane_imma", {**AFFINE, **GRID, "PLANES": 8, "COLUMNS": 2}, 128),
    ("dequantize", {**AFFINE, "PLANES": 8}, 255),
    *(
        ("lut_gemm", {**AFFINE, **TABLES, "PLANES": planes, "ROWS": rows}, 64)
        for planes, rows in ((2, 4), (3, 4), (4, 2), (7, 2), (8, 1))
    ),
    *(
        (
            "quantize_rows",
            {"INPUTS": inputs, "ROWS": rows, "THREADS": 512}
            | dict.fromkeys(("STATIC", "CLIPS", "SHIFTED"), static),
            128,
        )
        for inputs, rows, static in ((4096, 2, 0), (14336, 2, 1), (28672, 2, 0), (57344, 1, 0))
    ),
    (
        "quantize_rows",
        {
            "INPUTS": 128,
            "ROWS": 2,
            "THREADS": 32,
            "STATIC": 0,
            "CLIPS": 1,
            "SHIFTED": 0,
            "ACTIVATION_BF16": 1,
        },
        64,
    ),
    ("sign_flip", {}, 128),
    ("place_inputs", {}, 32),
    ("add_splits", {"ACTIVATION_BF16": 1, "EPILOGUE": 2}, 128),
    ("greedy", {}, 64),
    *(("nucleus", more, 64) for more in ({}, {"ACTIVATION_BF16": 1})),
    ("prompt_heads", {"HEAD_DIM": 128, "QK_NORM": 0}, 64),
    ("prompt_heads", {"HEAD_DIM": 256, "QK_NORM": 1, "ACTIVATION_BF16": 1}, 64),
    ("peer_sum", {"RANKS": 2}, 64),
    ("peer_sum", {"RANKS": 8, "ACTIVATION_BF16": 1}, 64),
    ("rms_norm", {"HIDDEN": 4096, "THREADS": 512}, 64),
    ("rms_norm", {"HIDDEN": 16384, "THREADS": 1024, "ACTIVATION_BF16": 1}, 64),
    ("rms_norm", {"HIDDEN": 100, "THREADS": 32}, 64),
    *(
        ("decode_attention", {**HEADS, "HEAD_DIM": dim, "HEADS": heads}, 255)
        for dim, heads in ((64, 1), (64, 8), (96, 4), (128, 4), (128, 7), (128, 8), (256, 4))
    ),
    (
        "decode_attention",
        {**HEADS, "HEAD_DIM": 128, "HEADS": 8, "BLOCKS": 2, "QK_NORM": 1, "ACTIVATION_BF16": 1},
        255,
    ),
    *(
        (
            "decode_attention",
            {**HEADS, "HEAD_DIM": dim, "HEADS": heads, "INT8_CACHE": 1, **more},
            255,
        )
        for dim, heads, more in (
            (64, 3, {}),
            (120, 4, {}),
            (128, 4, {}),
            (128, 8, {"QK_NORM": 1, "ACTIVATION_BF16": 1}),
            (256, 4, {}),
        )
    ),
]

HOPPER = "sm_90a"
# Of a warpgroup that gives registers to others: those that it begins with.
HOPPER_VARIANTS: list[tuple[str, dict[str, int], int]] = [
    ("int_gemm", {"BITS": bits, "SPAN": span, "STAGES": 5, "CLUSTER": cluster, **more}, 168)
    for bits, span in ((4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 4))
    for cluster, more in ((1, {}), (2, {"ACTIVATION_BF16": 1}))
]
HOPPER_VARIANTS += [
    ("decode_attention", {**HEADS, "HEAD_DIM": 128, "HEADS": 4, "BULK": 1, **more}, 255)
    for more in ({}, {"INT8_CACHE": 1, "STAGES": 6}, {"HEAD_DIM": 256, "WARPS": 4})
]
STREAM = {"WARPS": 16, "STAGES": 2, "ALIGNED": 1, "TILES": 14, "MAIN": 14, "REST": 2, "AHEAD": 3}
HOPPER_VARIANTS += [
    (f"bit_plane_lookup_{kind}", {**WEIGHT, "EPILOGUE": 0, "COLUMNS": 16, **more}, 128)
    for kind, more in (
        ("stream", {**STREAM, "PLANES": 3}),
        ("stream", {**STREAM, "PLANES": 4, "AHEAD": 2, "ACTIVATION_BF16": 1}),
        ("stream", {**STREAM, "PLANES": 3, "TILES": 16, "MAIN": 16, "REST": 0, "EPILOGUE": 2}),
        ("mma", {**GRID, "PLANES": 3, "WHOLE": 1, "LOADS": 8, "CLUSTER": 2}),
    )
]
HOPPER_VARIANTS += [
    (f"bit_plane_{kind}", {**LATE, "CLUSTER": 2, "LOADS": 4, "GROUP": 128, **more}, 128)
    for kind, more in (
        ("bmma", {"OFFSET": 1, "PLANES": 4, "COLUMNS": 1, "EPILOGUE": 1}),
        ("imma", {"OFFSET": 2, "PLANES": 4, "COLUMNS": 2}),
        ("imma", {"OFFSET": 1, "PLANES": 3, "COLUMNS": 2, "EPILOGUE": 2}),
    )
]
CHOSEN = {"FINE": 0, "MIRRORED": 0, "W_UNITS": 1}
RINGS = {**CHOSEN, "W_STAGES": 2, "X_STAGES": 4, "X_BLOCKS": 2, "EPILOGUE": 0, "ALIGNED": 1}
HOPPER_VARIANTS += [
    (
        "bit_plane_wgmma",
        {**RINGS, **weight, "PLANES": planes, "COLUMNS": columns, "GROUPS": groups, **more},
        most,
    )
    for weight, planes, columns, groups, more, most in (
        (WEIGHT, 3, 32, 4, {"W_UNITS": 2}, 96),
        (WEIGHT, 4, 64, 4, {"W_UNITS": 2, "FINE": 1, "MIRRORED": 1}, 96),
        (WEIGHT, 4, 48, 2, {"MIRRORED": 1, "ACTIVATION_BF16": 1}, 168),
        (WEIGHT, 8, 32, 4, {"FINE": 1}, 96),
        (WEIGHT, 3, 96, 2, {"ACTIVATION_BF16": 1}, 168),
        (WEIGHT, 4, 128, 2, {}, 168),
        (WEIGHT, 4, 256, 2, {"X_BLOCKS": 1, "EPILOGUE": 2}, 168),
        (AFFINE, 8, 128, 2, {"X_BLOCKS": 1, "EPILOGUE": 1}, 168),
        (AFFINE, 4, 64, 4, {}, 96),
        (AFFINE, 8, 64, 4, {"FINE": 1}, 96),
        (AFFINE, 3, 32, 4, {"ACTIVATION_BF16": 1}, 96),
        ({"GROUP": 96, "OFFSET": 1}, 2, 128, 2, {"X_BLOCKS": 1}, 168),
    )
]


def describe(variant) -> str:
    name, constants, _ = variant
    return "-".join([name, *(f"{key}{value}" for key, value in constants.items())])


def size(variant) -> int:
    return math.prod(max(1, variant[1].get(name, 1)) for name in SIZES)


def may_spill(name: str, constants: dict[str, int]) -> int:
    """Return how many bytes; four tokens as bytes are faster than others though they do."""
    as_bytes = "imma" in name or constants.get("BYTES") == 1
    four = as_bytes and name.startswith("bit_plane") and constants["COLUMNS"] == 4
    return 32 if four else 0


# Of each kernel and each limit. Older cards get the same text without the waits, and need fewer
# registers, by a tenth: these alone run there each time, all of them with the slow tests.
LARGEST = {(variant[0], variant[2]): variant for variant in sorted(VARIANTS, key=size)}


def on_each_card():
    """Return pairs of a variant and an architecture; some are slow."""
    for variant in VARIANTS:
        for architecture in (OLDEST, *BETWEEN, MEASURED):
            is_quick = architecture == OLDEST and variant in LARGEST.values()
            marks = [] if is_quick or architecture == MEASURED else [pytest.mark.slow]
            name = f"{describe(variant)}-{architecture}"
            yield pytest.param(variant, architecture, marks=marks, id=name)


@pytest.mark.parametrize(("variant", "architecture"), list(on_each_card()))
def test_kernel_compiles_without_spilling(variant, architecture):
    name, constants, registers = variant
    compiled = compile_for(architecture, kernel_source(name, constants))
    assert compiled.cubin
    assert compiled.spilled <= may_spill(name, constants)
    assert compiled.registers <= registers


# Of each kernel the variant with the fewest constants, for compiling takes its time.
PLAINEST = {
    variant[0]: variant
    for variant in sorted(VARIANTS, key=lambda one: len(one[1]), reverse=True)
    if not may_spill(variant[0], variant[1])
}


@pytest.mark.parametrize("architecture", NOT_TIMED)
@pytest.mark.parametrize("variant", PLAINEST.values(), ids=describe)
def test_each_kernel_compiles_for_cards_that_nobody_has_timed(variant, architecture):
    name, constants, registers = variant
    compiled = compile_for(architecture, kernel_source(name, constants))
    assert compiled.spilled == 0
    assert compiled.registers <= registers


@pytest.mark.parametrize("variant", HOPPER_VARIANTS, ids=describe)
def test_products_of_warpgroups_stay_asynchronous(variant):
    name, constants, registers = variant
    compiled = compile_for(HOPPER, kernel_source(name, constants))
    assert compiled.spilled == 0
    assert compiled.registers <= registers
    said = compiled.log.replace(name, "")
    assert "wgmma" not in said, said  # "... instructions are serialized"
    assert "warpgroup.arrive" not in compiled.log, compiled.log  # "... is injected": fenced apart
    assert "setmaxnreg" not in compiled.log, compiled.log  # "... ignored"


def test_every_kernel_has_a_variant_here():
    assert {name for name, _, _ in [*VARIANTS, *HOPPER_VARIANTS]} == {
        path.stem for path in resources.kernels_dir().glob("*.cu")
    }
