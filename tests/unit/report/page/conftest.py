"""A directory with all that runs leave behind, made by what production makes it with."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.core.paired import paired_means
from qtool.modeling.locate import Location
from qtool.pipeline.task_results import ScoreRow
from qtool.recipe.load import recipe_from_mapping
from qtool.scheme import WeightScheme
from qtool.timing import gpu, workload
from tests.unit.timing.rig import TINY, bench

RECIPE: dict[str, Any] = {
    "description": "Everything at once.",
    "calibration": {"num_samples": 12, "sequence_length": 32},
    "weights": {
        "method": "rtn",
        "scheme": {"num_bits": 3, "group_size": 32},
        "choose": {"group_dim": ["in_features", "out_features"]},
        "overrides": [
            {"match": "*.1.mlp.*", "scheme": {"num_bits": 2}},
            {"match": "*.0.mlp.*", "skip": True},
        ],
    },
    "tuning": {"blocks": {"steps": 3}},
    "check": {"max_kl": 1e-9, "windows": 1, "context_length": 32},
    "eval": {"windows": 1, "context_length": 32},
    "bench": {},
    "gates": {"kl_mean": {"text": 1.0}},
}


def task_row(name: str, gained: int) -> ScoreRow:
    """Return 40 items, of which the result does some better or worse."""
    original = [float(item % 2) for item in range(40)]
    result = [1.0 if item < gained or value else 0.0 for item, value in enumerate(original)]
    paired = paired_means(original, result)
    return ScoreRow(
        task=name,
        metric="acc",
        filter="none",
        shots=0,
        num_items=40,
        value=paired.quantized,
        standard_error=0.05,
        group=False,
        headline=True,
        original=paired.original,
        paired=paired,
        verdict="no difference shown",
    )


@pytest.fixture(scope="session")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the OUT_DIR of a run with everything; read only, but for report.html."""
    out_dir = tmp_path_factory.mktemp("reported") / "whole"
    sections = {**RECIPE, "calibration": {**RECIPE["calibration"], "dataset": str(text_file)}}
    sections["eval"] = {**RECIPE["eval"], "dataset": str(text_file)}
    pipeline.run_recipe(Location(llama, "demo:tiny"), out_dir, recipe_from_mapping(sections))
    rows = [asdict(task_row(name, gained)) for name, gained in (("arc", 9), ("mmlu", 0))]
    (out_dir / "tasks.json").write_text(json.dumps({"rows": rows, "failures": []}))
    shapes = replace(TINY, decoder=None)
    work = workload.synthetic_workload(
        "tiny", shapes, WeightScheme(num_bits=2, group_size=32), None, torch.device("cpu")
    )
    kernels = asdict(gpu.time_workload(work, bench(), {"qtool": "0"}))
    (out_dir / "kernels.json").write_text(json.dumps(kernels))
    yield out_dir
    shutil.rmtree(out_dir)
