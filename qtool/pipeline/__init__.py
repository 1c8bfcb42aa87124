"""What the command line calls: straight-line functions from a request to a result.

`quantizing` writes checkpoints, `measuring` looks at them, `scoring` asks them lm-eval's questions.
"""

from qtool.pipeline.calibrate import CalibrateResult, calibrate
from qtool.pipeline.measuring import (
    BenchOptions,
    Comparison,
    EvalOptions,
    GpuOptions,
    bench,
    evaluate,
)
from qtool.pipeline.model_figures import ModelFigures
from qtool.pipeline.quantizing import plan, quantize
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
