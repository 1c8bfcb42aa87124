"""What the command line calls: straight-line functions from a request to a result.

`quantizing` writes checkpoints, `measuring` looks at them, `scoring` asks them lm-eval's questions.
"""

from qtool.pipeline.calibrate import CalibrateResult, calibrate
from qtool.pipeline.measuring import (
    Comparison,
    EvalOptions,
    GpuOptions,
    bench,
    bench_gpu,
    evaluate,
)
from qtool.pipeline.model_figures import ModelFigures
from qtool.pipeline.quantizing import plan, quantize
from qtool.pipeline.reports import QuantizeResult
from qtool.pipeline.scoring import evaluate_tasks

__all__ = [
    "CalibrateResult",
    "Comparison",
    "EvalOptions",
    "GpuOptions",
    "ModelFigures",
    "QuantizeResult",
    "bench",
    "bench_gpu",
    "calibrate",
    "evaluate",
    "evaluate_tasks",
    "plan",
    "quantize",
]
