"""Calibrating, from a request to what is on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtool.base import Emit, ignore_events
from qtool.checkpoint.many_results import held
from qtool.data.calibration_files import check_no_calibration, save_calibration
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.calibration import CalibrationSection
from qtool.steps.draw_calibration import draw_calibration, wanted_lengths


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """What `calibrate` drew."""

    calib_dir: Path
    samples: int
    samples_wanted: int
    """More than `samples` if the text is too short."""
    tokens: int
    digest: str
    wanted_lengths: tuple[int, ...]
    """Lengths that were to be matched; empty if the length is fixed."""
    lengths: tuple[int, ...]
    special_tokens: Mapping[str, int]
    """How often each of the model's special tokens that matter is in the samples."""


def calibrate(  # noqa: PLR0913 - what to draw from, where to, how
    model: Location,
    calib_dir: Path,
    section: CalibrationSection,
    *,
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    emit: Emit = ignore_events,
) -> CalibrateResult:
    """Draw calibration samples and write them.

    `lengths` are those to match, in tokens, instead of the tasks' own; `seed` is of their order.

    Raises:
        OutputError: there are calibration data already, another run writes some there, or they
            can't be written.
    """
    check_no_calibration(calib_dir, overwrite=overwrite)
    source = open_source(model)
    check_no_calibration(calib_dir, overwrite=overwrite, model_directory=source.directory)
    tokenizer = load_tokenizer(source.directory)
    wanted = wanted_lengths(section, tokenizer, lengths)
    if lengths is not None:
        section = section.model_copy(update={"tasks": ()})  # provenance: they decided nothing
    with held(calib_dir):
        check_no_calibration(calib_dir, overwrite=overwrite)  # another run may just have ended
        calibration = draw_calibration(
            section, source, tokenizer, lengths=wanted, seed=seed, emit=emit
        )
        save_calibration(calibration, calib_dir)
    return CalibrateResult(
        calib_dir=calib_dir,
        samples=len(calibration.samples),
        samples_wanted=calibration.provenance["samples wanted"],
        tokens=calibration.num_tokens,
        digest=calibration.digest(),
        wanted_lengths=tuple(wanted or ()),
        lengths=tuple(len(sample) for sample in calibration.samples),
        special_tokens=calibration.provenance["special tokens"],
    )
