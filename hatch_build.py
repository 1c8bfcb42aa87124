"""The libraries of kernels/cpu go into a wheel that is built where a C compiler is."""

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILDING = Path("qtool/core/native/building.py")


class CompiledKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Compile a library for each level of instructions; without one the wheel is of Python alone.

    What is missing is compiled at the first call, into the cache of whoever calls.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what could be compiled to a wheel, which then is one of this platform."""
        if self.target_name != "wheel" or version == "editable":
            return
        root = Path(self.root)
        building, kernels = runpy.run_path(str(root / BUILDING)), root / "kernels" / "cpu"
        self._folder = tempfile.TemporaryDirectory()
        for level in building["instruction_levels"]():
            name = building["file_name"](kernels, level)
            target = Path(self._folder.name) / name
            complaint = building["compile_library"](kernels, level, target)
            if complaint is not None:
                self.app.display_warning(f"No library '{level}' in the wheel: {complaint}")
                continue
            build_data["force_include"][str(target)] = f"qtool/_native/{name}"
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
