"""One run of `quantize`: all that decides its result."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import qtool
from qtool.base import Env
from qtool.data.calibration import CalibrationSet
from qtool.engines import Pool
from qtool.modeling.source import ModelSource
from qtool.recipe.schema import Recipe
from qtool.steps.plan import Plan
from qtool.storage.digests import files_digest


@dataclass(frozen=True, slots=True)
class Run:
    """What is quantized, how, with which samples, and where it is computed."""

    source: ModelSource
    recipe: Recipe
    plan: Plan
    calibration: CalibrationSet | None
    env: Env
    samples_given: bool = False
    """They are of the user's directory: tuning draws no others."""
    pool: Pool | None = None
    """Workers that share the work; None: this process does it. It decides nothing of the result."""

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides the output: a resumed run must agree on it.

        Raises:
            OSError: a file of the model can't be read.
        """
        chosen = self.recipe.model_dump(mode="json")
        if self.recipe.calibration is not None:
            del chosen["calibration"]["strict"]  # it ends a run, and decides nothing of its result
        companions = self.source.companions().items()
        return {
            "recipe": chosen,
            "model": {
                "config": dict(self.source.config),
                "files": {name: sha256(content).hexdigest() for name, content in companions},
                "weights": files_digest(s.file for s in self.source.shards.specs.values()),
            },
            "calibration": self.calibration.digest() if self.calibration else None,
            "device": self.env.device.partition(":")[0],
            "version of qtool": qtool.__version__,
        }

    def stream_bytes(self) -> int:
        """Return what the block inputs of both models take on disk, in float32."""
        section = self.recipe.calibration
        if self.calibration is None or section is None or section.cache != "disk":
            return 0
        width = self.source.weight_shape(self.source.adapter.embedding).in_features
        return 2 * 4 * self.calibration.num_tokens * width
