"""The README.md of a checkpoint: what it is, where it comes from, how to run it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qtool.checkpoint.manifest import Manifest
from qtool.modeling.demo import DEMO_MODELS

FRONT_BYTES = 2**16
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_FILES = {  # what a file begins with, in small letters and single spaces
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
}
CARD_TEXT = """# {title}

Quantized with qtool {version}: {count} layers, {method}, {bits:.2f} bits per quantized weight with
scales and offsets{strict}.

| | |
|---|---|
{rows}

The recipe stands in `config.json` under `quantization_config`, what each layer lost in
`quantization_report.json`.

## Run it

```
pip install -e .    # in a checkout of qtool
```

```python
import qtool  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```

Without `import qtool` transformers ignores the quantization and loads random weights.
`qtool inspect` prints the layers, `qtool eval` the perplexity, `qtool bench` the speed.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a card says beside what the manifest has."""

    licence: Mapping[str, str] = field(default_factory=dict)
    """From `read_licence`."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Provenance of the samples; empty: no data."""
    weight_bytes: int = 0
    source_bytes: int = 0
    num_weights: int = 0
    """Of the whole model, embedding and head included."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Means over the layers, by what they are errors of."""


def model_card(manifest: Manifest, source: str | None, about: Provenance | None = None) -> str:
    """Return the card of a checkpoint.

    The source is the hub id or demo name of the original; None: a local model, which stays unnamed.
    """
    about = about or Provenance()
    demo = DEMO_MODELS.get(source or "")
    base = demo.hub_id if demo is not None else source
    licence = about.licence or ({"license": demo.licence} if demo is not None else {})
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    front |= {**licence, "library_name": "transformers", "tags": ["qtool", "quantized"]}
    weights = manifest.recipe.get("weights", {})
    strict = ""
    if about.num_weights:
        strict = f", {8 * about.weight_bytes / about.num_weights:.2f} with embedding and head"
    rows = _rows(base, licence, about)
    inputs = {entry.activation for entry in manifest.layers.values() if entry.activation}
    widths = sorted({f"{each.num_bits} bits per {each.granularity}" for each in inputs})
    if widths:
        rows.insert(1, ("inputs of quantized linears, as they run", ", ".join(widths)))
    text = CARD_TEXT.format(
        title=f"{base or 'A local model'}, quantized",
        version=manifest.tool_version,
        count=len(manifest.layers),
        method=weights.get("method", "several methods"),
        bits=manifest.average_bits(),
        strict=strict,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{text}"


def read_licence(directory: Path) -> dict[str, str]:
    """Return the keys of a model card on the licence of a model; empty if it doesn't say."""
    try:
        with (directory / "README.md").open("rb") as opened:
            head = opened.read(FRONT_BYTES).decode("utf-8-sig", errors="replace")
        front = yaml.safe_load(head.split("---", 2)[1]) if head.startswith("---") else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError, IndexError):
        front = None
    said = front if isinstance(front, dict) else {}
    keys = {key: said[key] for key in LICENCE_KEYS if isinstance(said.get(key), str)}
    return keys if "license" in keys else _licence_of_file(directory)


def _licence_of_file(directory: Path) -> dict[str, str]:
    for path in sorted(directory.glob("LICEN[CS]E*")):
        try:
            with path.open("rb") as opened:
                text = opened.read(2**10).decode("utf-8-sig", errors="replace")
        except OSError:
            continue
        words = " ".join(text.lower().split())
        for begin, name in LICENCE_FILES.items():
            if words.startswith(begin):
                return {"license": name}
    return {}


def _rows(base: str | None, licence: Mapping[str, str], about: Provenance) -> list[tuple[str, str]]:
    """Return the lines of the table; only what is known."""
    rows = [("original", base or "a local model")]
    if licence:
        rows.append(("licence of the original", licence.get("license_name", licence["license"])))
    if about.weight_bytes:
        share = about.weight_bytes / max(about.source_bytes, 1)
        rows.append(("size", f"{about.weight_bytes / 1e6:.1f} MB, {share:.0%} of the original"))
    data = "none"
    if about.calibration:
        data = "{dataset}: {samples} samples, {tokens} tokens".format_map(
            {"dataset": "?", "samples": "?", "tokens": "?", **about.calibration}
        )
    rows.append(("calibration data", data.replace("|", "\\|")))
    rows += [(f"mean {name}", f"{value:.2e}") for name, value in about.errors.items()]
    return rows
