"""What several tests share: problems, recipes, runs."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.base import LayerProblem, Notice, Progress, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core import moments
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.schema import Recipe
from qtool.scheme import WeightScheme

ROOT = Path(__file__).parents[1]
QUICK_BCQ: Mapping[str, Any] = {
    "rounds": 2,
    "iterations": 1,
    "clip_ratios": [1.0],
    "greedy": False,
    "start_powers": [0.0],
    "polish_rounds": 1,
}
"""Options of `bcq` where it is not what is tested: a tenth of the time."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal float32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(names: Iterable[str], in_features: int, seed: int = 7) -> dict[Any, Tensor]:
    """Return the statistics of correlated inputs that `names` asks for, as a run makes them."""
    if not (names := tuple(names)):
        return {}
    mixing = torch.eye(in_features) + 0.1 * normal(in_features, in_features, seed=seed)
    inputs = normal(4 * in_features, in_features, seed=seed + 1) @ mixing
    sums = moments.no_moments(in_features, None, device=inputs.device, for_errors=False)
    for batch in inputs.split(in_features):
        sums.add(batch, torch.zeros_like(batch), None)
    known = {"hessian": sums.mean("xx")}
    return {name: known[name] for name in names}


def problem(weight: Tensor, scheme: WeightScheme, needs: Iterable[str] = ()) -> LayerProblem:
    """Return what a method gets for one layer."""
    return LayerProblem(
        name="layer",
        weight=weight,
        scheme=scheme,
        statistics=statistics(needs, weight.shape[1]),
        generator=torch.Generator().manual_seed(0),
    )


def dequantized(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight by the definition of its format."""
    return codec(tensor.format).dequantize(tensor, dtype)


def recipe(
    method: str = "rtn", num_bits: int = 4, group_size: int | None = 32, **sections: Any
) -> Recipe:
    """Return a recipe; `sections` are those beside `weights`."""
    scheme = {"num_bits": num_bits, "group_size": group_size}
    return recipe_from_mapping({"weights": {"method": method, "scheme": scheme}, **sections})


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file of a directory."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def run_python(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> str:
    """Run a program in a fresh interpreter and return its stdout; its stderr explains a failure."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def warnings_in(events: Iterable[Progress | Notice]) -> list[str]:
    """Return what a user was warned of."""
    return [event.message for event in events if isinstance(event, Notice)]


def steps_in(events: Iterable[Progress | Notice], what: str) -> list[Progress]:
    """Return what a user was told of one step."""
    return [event for event in events if isinstance(event, Progress) and event.what == what]
