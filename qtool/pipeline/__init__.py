"""What the command line calls: straight-line functions from a request to a result.

One file per command; what they share lies beside them.
"""

from qtool.pipeline.bench import BenchOptions, GpuOptions, bench
from qtool.pipeline.calibrate import CalibrateResult, calibrate
from qtool.pipeline.evaluate import Comparison, EvalOptions, evaluate
from qtool.pipeline.model_figures import ModelFigures
from qtool.pipeline.preflight import preflight
from qtool.pipeline.quantize import explain, plan, quantize
from qtool.pipeline.reports import QuantizeResult
from qtool.pipeline.run import RunOptions, check_measurable, run_recipe
from qtool.pipeline.run_result import RunResult
from qtool.pipeline.sweep import SweepResult, sweep

__all__ = [
    "BenchOptions",
    "CalibrateResult",
    "Comparison",
    "EvalOptions",
    "GpuOptions",
    "ModelFigures",
    "QuantizeResult",
    "RunOptions",
    "RunResult",
    "SweepResult",
    "bench",
    "calibrate",
    "check_measurable",
    "evaluate",
    "explain",
    "plan",
    "preflight",
    "quantize",
    "run_recipe",
    "sweep",
]
