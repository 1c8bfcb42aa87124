"""Whether what `serve` needs is installed. Torch-free."""

import importlib.util

from qtool.errors import MissingExtraError


def check_servable() -> None:
    """Refuse where FastAPI or uvicorn isn't installed.

    Raises:
        MissingExtraError: one of them isn't.
    """
    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        raise MissingExtraError("`qtool serve`", "serve")
