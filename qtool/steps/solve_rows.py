"""Call a method; where memory is full, for some rows of the weight after the others."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from torch import Tensor

from qtool.base import Env, LayerProblem, LayerSolution, Method
from qtool.checkpoint.manifest import codec
from qtool.core.parts import within_memory
from qtool.plugins import PluginOptions
from qtool.scheme import WeightScheme


def solve_rows(
    method: Method, problem: LayerProblem, options: PluginOptions, env: Env
) -> LayerSolution:
    """Solve a problem whose rows are problems of their own.

    Args:
        method: Solves it.
        problem: The whole weight.
        options: Of the method.
        env: Where it is computed.

    Raises:
        MemoryError, RuntimeError: a few rows take more memory than there is.
    """
    generator = problem.generator
    state = None if generator is None else generator.get_state()
    rows, columns = problem.weight.shape
    unit = _unit(problem.scheme, rows)

    def solve(weight: Tensor) -> LayerSolution:
        if generator is not None and state is not None:
            generator.set_state(state)
        return method.solve(replace(problem, weight=weight), options)

    def work(count: int) -> LayerSolution:
        parts = _split(problem.weight, count, unit)
        return joined_rows([solve(part) for part in parts])

    what = f"weights of {rows} x {columns} are solved"
    return within_memory(env.parts, what, work, most=-(-rows // unit))


def _unit(scheme: WeightScheme, rows: int) -> int:
    """Return how many rows belong together."""
    return 1 if scheme.group_dim == "in_features" else scheme.group_size or rows


def _split(weight: Tensor, count: int, unit: int) -> Sequence[Tensor]:
    units = -(-len(weight) // unit)
    return weight.split(-(-units // count) * unit)


def joined_rows(solutions: Sequence[LayerSolution]) -> LayerSolution:
    """Return the solutions of parts, in order, as one; its metrics are their means."""
    first, *others = solutions
    if not others:
        return first
    tensor = codec(first.tensor.format).cat([each.tensor for each in solutions], 0)
    names = [name for name in first.metrics if all(name in each.metrics for each in others)]
    metrics = {name: fmean(each.metrics[name] for each in solutions) for name in names}
    fallbacks = (each.fallback for each in solutions if each.fallback is not None)
    return LayerSolution(tensor, metrics, next(fallbacks, None))
