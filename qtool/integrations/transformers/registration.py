"""Register qtool with transformers when transformers is imported, and not before.

`import qtool` must make `AutoModelForCausalLM.from_pretrained(OUT_DIR)` work, but `qtool --help`
must not wait for torch. So an import hook waits for `transformers.quantizers.auto`. Torch-free, and
without importlib.abc, which costs as much as all else that `import qtool` does.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TARGET = "transformers.quantizers.auto"
QUANTIZER = "qtool.integrations.transformers.quantizer"


class _Finder:
    """Finds one module: transformers' table of quantizers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                importlib.import_module(QUANTIZER)  # which registers it

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now if transformers' table is loaded, else as soon as it is; call as you like."""
    if TARGET in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
