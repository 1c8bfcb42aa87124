"""Solve an embedding or a head: without data, or under what its rows are used with.

Rows are problems of their own, so that large tables are cut, and that rows of unlike bits are
solved a class at a time. Methods see neither.
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core import metrics
from qtool.formats.mixed_rows import encode_mixed
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.solve_rows import solve_rows

WEIGHTS_AT_ONCE = 2**25
"""Of a table that is solved under a Hessian: a solver holds several copies in float32."""


def solve_alone(
    layer: LayerPlan, weight: Tensor, env: Env, hessian: Tensor | None = None
) -> LayerSolution:
    """Quantize a weight whose inputs aren't walked to.

    Args:
        layer: What to do with it; with `row_bits`, each class of rows is solved by itself.
        weight: (out_features, in_features) float32.
        env: Where it is computed.
        hessian: Under what its rows are to be near, (in_features, in_features) float32; None:
            each weight counts alike.

    Raises:
        SchemeError: the method can't do the scheme.
    """
    if not layer.row_bits:
        return _solved(layer, weight, hessian, env)
    row_bits = torch.frombuffer(bytearray(layer.row_bits), dtype=torch.uint8).to(weight.device)
    solutions = []
    for num_bits, _ in layer.scheme.rows:
        rows = weight[row_bits == num_bits]
        solutions.append(_solved(layer.uniform(num_bits), rows, hessian, env))
    tensor = encode_mixed([solution.tensor for solution in solutions], row_bits)
    return _as_one(solutions, tensor, weight, hessian)


def _solved(layer: LayerPlan, weight: Tensor, hessian: Tensor | None, env: Env) -> LayerSolution:
    """Solve rows of one width, if need be in parts."""
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    is_one = hessian is None or layer.scheme.group_dim == "out_features"
    parts = (weight,) if is_one else weight.split(rows)
    solutions = [_solved_at_once(layer, part, hessian, env) for part in parts]
    if len(solutions) == 1:
        return solutions[0]
    tensors = [solution.tensor for solution in solutions]
    return _as_one(solutions, codec(tensors[0].format).cat(tensors, 0), weight, hessian)


def _solved_at_once(
    layer: LayerPlan, weight: Tensor, hessian: Tensor | None, env: Env
) -> LayerSolution:
    method = load_method(layer.method)
    problem = LayerProblem(
        name=layer.name,
        weight=weight,
        scheme=layer.scheme,
        statistics={} if hessian is None else {"hessian": hessian},
        generator=torch.Generator(env.device).manual_seed(env.seed),
    )
    return solve_rows(method, problem, layer.options, env)


def _as_one(
    solutions: Sequence[LayerSolution],
    tensor: QuantizedTensor,
    weight: Tensor,
    hessian: Tensor | None,
) -> LayerSolution:
    """Return the solutions of all rows as one, measured as a whole."""
    dense = codec(tensor.format).dequantize(tensor, torch.float32)
    names = [name for name in solutions[0].metrics if all(name in s.metrics for s in solutions)]
    means = {name: fmean(solution.metrics[name] for solution in solutions) for name in names}
    fallback = next((s.fallback for s in solutions if s.fallback is not None), None)
    return LayerSolution(tensor, means | metrics.of_layer(weight, dense, hessian), fallback)
