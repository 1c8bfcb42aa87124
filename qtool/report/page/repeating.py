"""The section on what the numbers hold for, and the command that repeats them."""

import shlex

import yaml

from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import Absent, Code, PageSection, PageTable, Part, Words

_TITLE = "Environment, and how to repeat this"
RECIPE_NAME = "recipe.yaml"


def repeating_section(evidence: Evidence) -> PageSection | Absent:
    """Return versions, command and recipe."""
    manifest, report = evidence.manifest, evidence.report
    if manifest is None:
        return Absent(_TITLE, "There is no checkpoint, whose config.json has the recipe.")
    rows = [
        ("original", manifest.source or "a local model, whose path isn't noted"),
        ("written by", f"qtool {manifest.tool_version}, format {manifest.format_version}"),
        ("device", str(report.get("device", "not noted"))),
        *((name, str(version)) for name, version in (report.get("versions") or {}).items()),
    ]
    if manifest.calibration:
        rows.append(("digest of the calibration samples", manifest.calibration))
    model = manifest.source or "MODEL"
    words = ["qtool", "quantize", "--recipe", RECIPE_NAME, model, evidence.name]
    parts: list[Part] = [
        PageTable("What the numbers hold for", ("what", "value"), tuple(rows)),
        Words(
            f"Save the recipe as {RECIPE_NAME}. If the samples came from a directory of `qtool "
            "calibrate`, add --calibration with it; config.json has their digest."
        ),
        Code("Command", shlex.join(words)),
        Code(RECIPE_NAME, yaml.safe_dump(dict(manifest.recipe), sort_keys=False, width=80)),
    ]
    return PageSection(_TITLE, tuple(parts))
