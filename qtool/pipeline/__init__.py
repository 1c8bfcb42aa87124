"""What the command line calls: straight-line functions from a request to a result.

One file per command; what they share lies beside them.
"""

from qtool.pipeline.bench import BenchOptions, GpuOptions, bench
from qtool.pipeline.calibrate import CalibrateResult, calibrate
from qtool.pipeline.evaluate import Comparison, EvalOptions, evaluate
from qtool.pipeline.model_figures import ModelFigures
from qtool.pipeline.quantize import plan, quantize
from qtool.pipeline.reports import QuantizeResult

__all__ = [
    "BenchOptions",
    "CalibrateResult",
    "Comparison",
    "EvalOptions",
    "GpuOptions",
    "ModelFigures",
    "QuantizeResult",
    "bench",
    "calibrate",
    "evaluate",
    "plan",
    "quantize",
]
