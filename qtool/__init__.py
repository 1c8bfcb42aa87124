"""qtool: post-training quantization of language models to 1-8 bits, and a runtime for the result.

Importing it registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained(OUT_DIR)` works; torch is imported only when it is needed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from qtool.integrations.transformers.registration import register as _register

__version__ = "0.1.0"

_LAZY = {
    "CheckpointReader": "qtool.checkpoint.reader",
    "QtoolError": "qtool.errors",
    "Recipe": "qtool.recipe.schema",
    "WeightScheme": "qtool.scheme",
    "bench": "qtool.pipeline",
    "disable_adapter": "qtool.modeling.adapters",
    "evaluate": "qtool.pipeline",
    "launched": "qtool.runtime.tensor_parallel",
    "load_adapter": "qtool.modeling.adapters",
    "load_model": "qtool.modeling.load",
    "locate": "qtool.modeling.locate",
    "load_recipe": "qtool.recipe.load",
    "quantize": "qtool.pipeline",
    "spread_model": "qtool.runtime.spread",
    "set_adapter": "qtool.modeling.adapters",
    "use_backend": "qtool.runtime.backends._choose",
    "use_kv_cache": "qtool.runtime.decode.cache",
}

_OF_MODELS = ("bench", "evaluate", "load_model", "quantize")
"""These take names of models here, as the command line does; below, a `Location`."""

__all__ = ["__version__", *sorted(_LAZY)]

_register()


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    found = getattr(importlib.import_module(_LAZY[name]), name)
    return _by_name(found) if name in _OF_MODELS else found


@functools.cache
def _by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of models take their names."""
    from qtool.modeling.locate import locate

    @functools.wraps(function)
    def call(model: Any, *others: Any, **options: Any) -> Any:  # noqa: ANN401
        if isinstance(options.get("baseline"), str):
            options["baseline"] = locate(options["baseline"])
        return function(locate(model) if isinstance(model, str) else model, *others, **options)

    return call
