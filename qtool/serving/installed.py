"""Whether what `serve` needs is installed. Torch-free."""

from qtool.errors import require


def check_servable() -> None:
    """Refuse where FastAPI or uvicorn isn't installed.

    Raises:
        MissingExtraError: one of them isn't.
    """
    require("`qtool serve`", "serve", "fastapi", "uvicorn")
