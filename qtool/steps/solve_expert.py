"""Quantize a layer of one expert for the tokens routed to it, or, where these are few, for more."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from qtool.base import Env, LayerSolution, ignore_events
from qtool.recipe.calibration import CalibrationSection
from qtool.steps.plan import LayerPlan
from qtool.steps.solve_calibrated import solve_calibrated
from qtool.walk.routed import ExpertStatistics, TokensFrom


def solve_expert(
    layer: LayerPlan,
    weight: Tensor,
    statistics: ExpertStatistics,
    section: CalibrationSection,
    env: Env,
) -> tuple[LayerPlan, LayerSolution, TokensFrom]:
    """Quantize a layer for each set of tokens that its statistics have; return the best.

    Args:
        layer: What to do with it.
        weight: (out_features, in_features) float32.
        statistics: Of its inputs.
        section: How calibration is used.
        env: Where it is computed.

    Returns:
        The plan with what was chosen, its solution, and for which tokens that was solved: of those
        with the least error on held-out tokens.
    """
    quiet = replace(env, emit=ignore_events)  # `coverage` tells of all experts at once
    section = section.model_copy(update={"part_rows": None})  # experts are apart already
    found: dict[TokensFrom, tuple[LayerPlan, LayerSolution]] = {
        tokens_from: solve_calibrated(layer, weight, (made(),), section, quiet)
        for tokens_from, made in statistics.candidates.items()
    }
    errors = {tokens_from: each[1].metrics["output_error"] for tokens_from, each in found.items()}
    best = min(errors, key=errors.__getitem__)
    chosen, solution = found[best]
    tried: Mapping[str, float] = (
        {f"output_error_{tokens_from}": error for tokens_from, error in errors.items()}
        if len(errors) > 1
        else {}
    )
    counts = {"tokens": statistics.tokens, "tokens_held_out": statistics.held_out}
    metrics = {**solution.metrics, **counts, **tried}
    return chosen, replace(solution, metrics=metrics), best
