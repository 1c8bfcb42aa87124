"""What several tests share: problems, recipes, runs."""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.base import LayerProblem, Notice, Progress, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core import grouping, moments
from qtool.core.sequential_code import serial_network
from qtool.core.xor_networks import tapped_network
from qtool.formats._encoded_starts import encrypted_start, sparse_start
from qtool.formats.minima import MINIMA, minima_to_binary
from qtool.formats.nested import NESTED, nested_to_binary
from qtool.recipe.load import recipe_from_mapping
from qtool.recipe.schema import Recipe
from qtool.scheme import BitCode, Shape2D, WeightScheme

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


def stepped(format_name: str, scheme: WeightScheme, shape: Shape2D, seed: int) -> QuantizedTensor:
    """Return a weight of a format of imported models, which no method makes."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part, spec in codec(format_name).layout(scheme, shape).items():
        drawn = torch.randint(-(2**31), 2**31, spec.shape, generator=generator)
        parts[part] = drawn.to(torch.int32)
        if spec.dtype == "float16":
            parts[part] = (torch.randn(spec.shape, generator=generator) / 64).half()
    return QuantizedTensor(format_name, scheme, shape, parts)


def encrypted(weight: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Return a weight whose planes 3 of 4 bits say: those nearest to it, plane after plane."""
    generator = torch.Generator().manual_seed(0)
    networks = torch.stack([tapped_network(4, 3, 2, generator) for _ in range(scheme.num_bits)])
    return encrypted_start(weight, networks, scheme)


def sparse(weight: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Return a weight of which the smaller six of ten are zero."""
    code = BitCode(num_inputs=2, num_outputs=5, registers=3)
    network = serial_network(5, 2, 3, torch.Generator().manual_seed(0))
    scheme = replace(scheme, num_bits=min(scheme.num_bits, 4), symmetric=True, code=code)
    kept = weight.abs() >= weight.abs().flatten().quantile(0.6)
    return sparse_start(weight, kept, network, scheme)


def rounding_of_steps(tensor: QuantizedTensor) -> Tensor:
    """Return by how much float16 parameters may change a `minima` or `nested` weight; float64."""
    scheme, shape = tensor.scheme, tensor.shape
    binary = (nested_to_binary if tensor.format == NESTED else minima_to_binary)(tensor)
    offsets = grouping.spread(binary.parts["plane_offsets"].double(), scheme, shape)
    weight = dequantized(tensor, torch.float64)
    steps = weight if scheme.symmetric else weight - offsets
    allowed = torch.zeros_like(weight) if tensor.format == MINIMA else steps.abs()
    allowed += 0 if scheme.symmetric else offsets.abs()
    return allowed * 2**-11 + (scheme.num_bits + 2) * 2.0**-25


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


def free_port() -> int:
    """Return a port that nobody listens at.

    It is below those that the system gives connections as their own ends: one that is tried before
    a server listens might else be connected with itself, and takes the port.
    """
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def warnings_in(events: Iterable[Progress | Notice]) -> list[str]:
    """Return what a user was warned of."""
    return [event.message for event in events if isinstance(event, Notice)]


def steps_in(events: Iterable[Progress | Notice], what: str) -> list[Progress]:
    """Return what a user was told of one step."""
    return [event for event in events if isinstance(event, Progress) and event.what == what]
