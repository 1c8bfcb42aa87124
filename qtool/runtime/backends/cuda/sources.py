"""The text of a kernel, ready to compile: constants, what all kernels share, the kernel itself."""

import re
from collections.abc import Mapping
from pathlib import Path

from qtool import resources

COMMON = "common.cuh"
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def kernel_source(name: str, constants: Mapping[str, int]) -> str:
    """Return CUDA C++ that needs no header.

    Args:
        name: Of the file kernels/NAME.cu.
        constants: The macros that its head asks for; `ACTIVATION_BF16` counts if it is there at
            all.
    """
    directory = resources.kernels_dir()
    lines = [f"#define {key} {value}" for key, value in sorted(constants.items())]
    parts = [_with_includes(directory / file) for file in (COMMON, f"{name}.cu")]
    return "\n".join([*lines, *parts])


def _with_includes(path: Path) -> str:
    """Return a file's text with the files of the same folder that it includes."""
    text = path.read_text(encoding="utf-8")
    return INCLUDE.sub(lambda found: _with_includes(path.parent / found[1]), text)
