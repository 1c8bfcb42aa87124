"""A first guess of how long a calibrated run takes, from the sizes of files alone. Torch-free.

It is meant to tell a minute from an hour before the first layer is solved; then what is measured
takes its place.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtool.modeling.locate import Location
    from qtool.recipe.calibration import CalibrationSection

WEIGHT_BYTES = {".safetensors": 2.0, ".gguf": 0.625}
"""Per weight, as most files have them: 16 and 5 bits."""
START_SECONDS = 15
"""Imports, opening the model, drawing samples."""
SOLVE_SECONDS = 4e-6
TOKEN_SECONDS = 1e-10
"""Per weight, and per weight and token that the blocks see: `bcq` with 3 bits on one busy core."""
CARD = 200
"""Times as fast as a core."""
SAMPLE_TOKENS = 2048


def guess_seconds(
    model: "Location", section: "CalibrationSection", device: str | None
) -> float | None:
    """Return about how many seconds a calibrated run takes; None: the size isn't known yet."""
    path = model.path
    if path is None:
        return None
    files = [path] if path.is_file() else path.iterdir()
    sizes = ((file.stat().st_size, WEIGHT_BYTES.get(file.suffix)) for file in files)
    weights = sum(size / each for size, each in sizes if each)
    if section.sequence_length == "match":
        tokens = section.num_tokens
    else:
        length = section.sequence_length
        tokens = section.num_samples * (SAMPLE_TOKENS if length == "fixed" else int(length))
    card = device != "cpu" and Path("/dev/nvidia0").exists()
    speed = CARD if card else os.cpu_count() or 1
    return START_SECONDS + weights * (SOLVE_SECONDS + tokens * TOKEN_SECONDS) / speed
