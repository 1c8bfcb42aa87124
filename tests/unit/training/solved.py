"""Weights of every format as the product's own methods make them."""

from collections.abc import Mapping

from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.scheme import WeightScheme
from qtool.steps.method_choice import load_method, parse_options
from tests.helpers import problem

QUICK = {"rounds": 3, "clip_ratios": [1.0], "greedy": False}
SOLVERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "affine": ("rtn", {}),
    "binary_coding": ("bcq", QUICK),
    "coded_scales": ("bcq", {**QUICK, "scales": "coded"}),
}


def solved(name: str, weight: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """Return a weight (out_features, in_features) in the format of this name."""
    method_name, values = SOLVERS[name]
    method = load_method(method_name)
    options = parse_options(method_name, method, values)
    return method.solve(problem(weight, scheme), options).tensor
