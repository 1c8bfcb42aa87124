"""What the command line calls: straight-line functions from a request to a result.

One file per command; what they share lies beside them.
"""

from qtool.pipeline.bench import BenchOptions, BenchResult, CpuOptions, GpuOptions, bench
from qtool.pipeline.calibrate import CalibrateResult, calibrate
from qtool.pipeline.chat import ChatOptions, chat
from qtool.pipeline.cluster import cluster_like_this, foresee
from qtool.pipeline.compare import CompareOptions, ModelsCompared, compare
from qtool.pipeline.evaluate import Comparison, EvalOptions, evaluate
from qtool.pipeline.export import ExportResult, export
from qtool.pipeline.grid import CellResult, GridResult, grid
from qtool.pipeline.grid_scores import GridScores, ScoreResult
from qtool.pipeline.import_model import ImportResult, import_model
from qtool.pipeline.model_figures import ModelFigures
from qtool.pipeline.preflight import preflight
from qtool.pipeline.quantize import explain, plan, quantize
from qtool.pipeline.report import report
from qtool.pipeline.reports import QuantizeResult
from qtool.pipeline.run import RunOptions, check_measurable, run_recipe
from qtool.pipeline.run_result import RunResult
from qtool.pipeline.serve import ServeOptions, serve
from qtool.pipeline.sweep import SweepResult, sweep
from qtool.pipeline.tune_card import CardTuned, tune_card
from qtool.pipeline.written import ModelWritten, PairOptions, write_pairs

__all__ = [
    "BenchOptions",
    "BenchResult",
    "CalibrateResult",
    "CardTuned",
    "CellResult",
    "ChatOptions",
    "CompareOptions",
    "Comparison",
    "CpuOptions",
    "EvalOptions",
    "ExportResult",
    "GpuOptions",
    "GridResult",
    "GridScores",
    "ImportResult",
    "ModelFigures",
    "ModelWritten",
    "ModelsCompared",
    "PairOptions",
    "QuantizeResult",
    "RunOptions",
    "RunResult",
    "ScoreResult",
    "ServeOptions",
    "SweepResult",
    "bench",
    "calibrate",
    "chat",
    "check_measurable",
    "cluster_like_this",
    "compare",
    "evaluate",
    "explain",
    "export",
    "foresee",
    "grid",
    "import_model",
    "plan",
    "preflight",
    "quantize",
    "report",
    "run_recipe",
    "serve",
    "sweep",
    "tune_card",
    "write_pairs",
]
