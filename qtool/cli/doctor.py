"""`qtool doctor`: what is installed, which backends run and why not."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtool import settings
from qtool.cli import console, early
from qtool.cli.options import JsonOption, check_targets
from qtool.cli.progress import progress
from qtool.errors import install_line
from qtool.wording import gigabytes

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pydantic", "typer", "rich")
EXTRAS = {
    "gpu": "cupy",
    "adapt": "peft",
    "eval": "lm_eval",
    "data": "datasets",
    "demo": "gguf",
    "export": "gguf",
    "ray": "ray",
    "report": "matplotlib",
    "search": "optuna",
    "serve": "fastapi",
}
"""What an extra is for: the module that stands for it."""


def doctor(
    json_file: JsonOption = None,
) -> None:
    """Print what is installed, which backends run here and why not, and what is set."""
    check_targets([json_file])
    with progress() as emit, early.opened([], None, emit):
        found = _found()
    if console.write_json(found, json_file):
        given = found["settings"]
        console.print_table("Installed", ("what", "version"), found["installed"].items())
        console.print_table("Extras", ("extra", "installed"), found["extras"].items())
        rows = [(name, given[name] or "", text) for name, text in settings.VARIABLES.items()]
        console.print_table("Settings", ("variable", "set to", "what it does"), rows)
        rows = list(found["backends"].items())
        console.print_table(f"Backends on {found['device']}", ("backend", "runs here"), rows)


def _found() -> dict[str, Any]:
    """Return what is installed and what runs here."""
    import torch  # slow

    import qtool
    import qtool.runtime.backends
    from qtool import plugins
    from qtool.core.native.library import found_library
    from qtool.core.native.threads import library_threads
    from qtool.runtime.backends.cuda.selection import selection_for, wanted_kernel

    device, card, size = torch.device("cpu"), "", "none that torch can use"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, card = torch.device("cuda"), properties.name
        size = f"{card}, {gigabytes(properties.total_memory)}"
    wanted, chosen = wanted_kernel(), str(selection_for(card))
    given, library = settings.given(), found_library()
    native = (
        library if isinstance(library, str) else f"{library.level}, {library_threads()} threads"
    )
    return {
        "installed": {
            "qtool": qtool.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} of them",
            "gpu": size,
            "kernels": chosen if wanted is None else f"{wanted}, as $QTOOL_KERNEL says",
            "native": native,
            "cache": str(settings.cache_dir()),
        },
        "extras": {
            extra: "yes" if importlib.util.find_spec(module) else install_line(extra)
            for extra, module in EXTRAS.items()
        },
        "settings": {name: given.get(name) for name in settings.VARIABLES},
        "device": str(device),
        "backends": _backends(plugins.names(qtool.runtime.backends), device),
    }


def _backends(names: Sequence[str], device: "torch.device") -> dict[str, str]:
    """Try each backend on a small binary-coded weight."""
    import torch

    from qtool.base import LayerProblem
    from qtool.runtime.backends._choose import load_backend
    from qtool.scheme import WeightScheme
    from qtool.steps.plan import load_method

    method, scheme = load_method("bcq"), WeightScheme(num_bits=2, group_size=32)
    problem = LayerProblem(name="probe", weight=torch.eye(64), scheme=scheme)
    tensor = method.solve(problem, method.options()).tensor
    backends = {name: load_backend(name) for name in names}
    return {
        name: backend.why_not(tensor, device) or f"runs, priority {backend.priority}"
        for name, backend in backends.items()
    }
