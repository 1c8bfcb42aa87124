"""The text of kernels/cpu under the compiler's sanitizers, of addresses and undefined behaviour."""

import subprocess
from pathlib import Path

import pytest

from qtool import resources
from qtool.core.native import building
from qtool.core.native.library import best_level

NAMES = ("driver.c", "decode_driver.c", "columns_driver.c", "groups_driver.c")
DRIVERS = [str(Path(__file__).parent / name) for name in NAMES]
LEVELS = list(building.instruction_levels())
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g", "-Wall")
OPEN = ("-std=c11", "-pthread", "-Wno-psabi", "-D_GNU_SOURCE", "-Werror")


@pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("level", LEVELS)
def test_sanitizers_find_nothing(level, tmp_path):
    if LEVELS.index(level) < LEVELS.index(best_level()):
        pytest.skip("this processor has no such instructions")
    kernels, program = resources.kernels_dir() / "cpu", tmp_path / "driver"
    sources = [str(kernels / name) for name in building.SOURCES]
    flags = (*OPEN, *CHECKS, *building.instruction_levels()[level], f"-I{kernels}")
    command = [str(building.compiler()), *flags, *DRIVERS, *sources, "-o", str(program), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if "asan" in made.stderr and "cannot find" in made.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:] or "numbers differ"
