"""Let other libraries know of qtool when they are imported, and not before.

`import qtool` must make `AutoModelForCausalLM.from_pretrained(OUT_DIR)` work, but `qtool --help`
must not wait for torch; and torch imports qtool wherever both are installed (`qtool_autoload`), in
programs that never meet a checkpoint. So an import hook waits for transformers' table of formats,
and an entry of that table for the first checkpoint. Torch-free, and without importlib.abc, which
costs as much as all else that `import qtool` does.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

FORMAT_NAME = "qtool"
TABLE_OF_FORMATS = "transformers.quantizers.auto"
HOOKED = (TABLE_OF_FORMATS, "transformers.modeling_utils")
"""The second is for programs that import the table before torch: torch calls us amid its import."""
QUANTIZER = "qtool.integrations.transformers.quantizer"


class FirstCheckpoint:
    """Stands in transformers' table for the configuration of qtool's format until one is read."""

    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        """Put the true one there, and pass the values on.

        Raises:
            ImportError: it can't be imported, as nothing else may then load such a checkpoint.
        """
        table = sys.modules[TABLE_OF_FORMATS].AUTO_QUANTIZATION_CONFIG_MAPPING
        try:
            importlib.import_module(QUANTIZER)  # which registers it
        except BaseException:
            table[FORMAT_NAME] = (
                FirstCheckpoint  # without, transformers fills the layers with noise
            )
            raise
        return table[FORMAT_NAME].from_dict(values, **options)


class _Finder:
    """Finds the modules that something waits for."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], object]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.calls:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self.calls[fullname]()

            spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


def when_imported(name: str, call: Callable[[], object]) -> None:
    """Call as soon as a module has been imported, which may be now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is not None and not getattr(spec, "_initializing", False):
        call()
        return
    finder = next((each for each in sys.meta_path if isinstance(each, _Finder)), None)
    if finder is None:
        sys.meta_path.insert(0, finder := _Finder())
    finder.calls[name] = call


def register() -> None:
    """Register now if transformers' table is loaded, else as soon as it is; call as you like."""
    for name in HOOKED:
        when_imported(name, _enter)


def _enter() -> None:
    """Enter the format into transformers' table, if that is there."""
    table = getattr(sys.modules.get(TABLE_OF_FORMATS), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if table is not None:
        table.setdefault(FORMAT_NAME, FirstCheckpoint)
