"""`qtool doctor`: what is installed, which backends run and why not."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from qtool import settings
from qtool.cli import console, early
from qtool.cli.options import JsonOption, check_targets
from qtool.cli.progress import progress
from qtool.errors import install_line
from qtool.wording import gigabytes

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pydantic", "typer", "rich")
EXTRAS = {
    "gpu": "cupy",
    "eval": "lm_eval",
    "data": "datasets",
    "demo": "gguf",
    "report": "matplotlib",
}
"""What an extra is for: the module that stands for it."""


def doctor(
    json_file: JsonOption = None,
) -> None:
    """Print what is installed, which backends run here and why not, and what is set."""
    check_targets([json_file])
    with progress() as emit, early.opened([], None, emit):
        found = _found()
    console.write_json(found, json_file)
    if console.wants_table(json_file):
        left = {"what": "left", "": "left"}
        console.print_table("Installed", left, list(found["installed"].items()))
        console.print_table("Extras", left, list(found["extras"].items()))
        says = {"variable": "left", "set to": "left", "what it does": "left"}
        given = found["settings"]
        rows = [(name, given[name] or "", text) for name, text in settings.VARIABLES.items()]
        console.print_table("Settings", says, rows)
        title = f"Backends on {found['device']}"
        console.print_table(title, left, list(found["backends"].items()))


def _found() -> dict[str, Any]:
    """Return what is installed and what runs here."""
    import torch  # slow

    import qtool
    import qtool.runtime.backends
    from qtool import plugins

    installed = {"qtool": qtool.__version__, "python": platform.python_version()}
    installed |= {name: importlib.metadata.version(name) for name in PACKAGES}
    installed["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    installed["gpu"] = _gpu()
    installed["kernels"] = _kernels()
    installed["cache"] = str(settings.cache_dir())
    extras = {
        extra: "yes" if importlib.util.find_spec(module) else install_line(extra)
        for extra, module in EXTRAS.items()
    }
    given = settings.given()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = plugins.names(qtool.runtime.backends)
    backends = {name: _backend_state(name, device) for name in names}
    return {
        "installed": installed,
        "extras": extras,
        "settings": {name: given.get(name) for name in settings.VARIABLES},
        "device": str(device),
        "backends": backends,
    }


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {gigabytes(properties.total_memory)}"


def _kernels() -> str:
    """Say which kernel runs how many tokens here."""
    import torch

    from qtool.runtime.selection import selection_for, wanted_kernel

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    wanted = wanted_kernel()
    chosen = str(selection_for(name))
    return chosen if wanted is None else f"{wanted}, as $QTOOL_KERNEL says"


def _backend_state(name: str, device: "torch.device") -> str:  # type: ignore[name-defined]  # noqa: F821
    """Try a small binary-coded weight."""
    import torch

    from qtool.base import LayerProblem
    from qtool.runtime.select import load_backend
    from qtool.scheme import WeightScheme
    from qtool.stages.plan import load_method

    method = load_method("bcq")
    problem = LayerProblem(
        name="probe", weight=torch.eye(64), scheme=WeightScheme(num_bits=2, group_size=32)
    )
    tensor = method.solve(problem, method.options()).tensor
    backend = load_backend(name)
    return backend.why_not(tensor, device) or f"runs, priority {backend.priority}"
