"""Compile kernels/cpu for each level of instructions into build/native, where tests find it.

Needs the standard library alone, so that `make` runs it while packages are installed.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Compile what isn't there; a test says what doesn't compile."""
    building = runpy.run_path(str(ROOT / "qtool/core/native/building.py"))
    kernels, folder = ROOT / "kernels" / "cpu", ROOT / "build" / "native"
    for level in building["instruction_levels"]():
        target = folder / building["file_name"](kernels, level)
        complaint = target.exists() or building["compile_library"](kernels, level, target)
        if isinstance(complaint, str):
            sys.stderr.write(f"{level}: {complaint}\n")


if __name__ == "__main__":
    main()
