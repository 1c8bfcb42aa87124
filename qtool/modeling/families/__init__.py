"""Model families: one file per `model_type`, dotted names only, constant ADAPTER."""

import sys

from qtool import plugins
from qtool.base import ModelAdapter

ALIKE = dict.fromkeys(("mistral", "qwen2", "qwen3"), "llama")
"""Model types that call their parts as another one does: they share its file."""


def families() -> tuple[str, ...]:
    """Return the sorted model types that have a file, or share one."""
    return tuple(sorted({*plugins.names(sys.modules[__name__]), *ALIKE}))


def load_family(family: str) -> ModelAdapter:
    """Return the adapter of one of `families`."""
    name = ALIKE.get(family, family)
    return plugins.load(sys.modules[__name__], name, "ADAPTER", ModelAdapter)
