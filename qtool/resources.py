"""Where the shipped recipes and kernels are: at the repository's root, or inside the wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def _find(name: str) -> Path:
    """Return the folder `name` of a source checkout, else its copy inside the wheel."""
    in_wheel = _PACKAGE / f"_{name}"
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / name


def recipes_dir() -> Path:
    """Return the folder of the built-in recipes."""
    return _find("recipes")


def kernels_dir() -> Path:
    """Return the folder of the CUDA sources, and of C in `cpu`."""
    return _find("kernels")


def native_dir() -> Path:
    """Return the folder of libraries that a wheel was built with; there need be none."""
    return _PACKAGE / "_native"


def prompts_dir() -> Path:
    """Return the folder of the bundled task prompts, whose lengths calibration can match."""
    return _PACKAGE / "data" / "prompts"


def texts_dir() -> Path:
    """Return the folder of the bundled texts."""
    return _PACKAGE / "data" / "texts"
