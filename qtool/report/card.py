"""The README.md of a checkpoint: what it is, where it comes from, how to run and to repeat it.

The front matter is what the Hugging Face Hub reads of a model card.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from qtool.checkpoint.kept_kinds import kept_kinds
from qtool.checkpoint.manifest import Manifest
from qtool.modeling.demo import DEMO_MODELS
from qtool.report.measured import Measured
from qtool.report.measured_text import markdown_table, measured_section
from qtool.wording import gigabytes

CARD_TEXT = """# {title}, quantized

Quantized with qtool {version}: {count} layers, {method}, {bits:.2f} bits per quantized weight with
scales and offsets{strict}.

{table}

What each layer lost stands in `quantization_report.json`.{kept}

## Calibration

{calibration}

## Evaluation

{measured}

## Run it

```
pip install -e .    # in a checkout of qtool
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8)[0]))
```

Where qtool is installed transformers finds it; elsewhere it ignores the quantization and loads
random weights. `qtool inspect` prints the layers, `qtool eval` measures quality, `qtool bench`
speed. Servers in Python that load models by transformers run it too; on a CUDA card `generate`
runs qtool's kernels.

## Repeat it

```
qtool quantize --recipe recipe.yaml{calibration_option} {location} OUT_DIR
```

<details><summary>recipe.yaml</summary>

```yaml
{recipe}
```

</details>

## Limits

{limits}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextUse:
    """A text that was calibrated on."""

    name: str
    licence: str
    samples: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a card says beside what the manifest has."""

    licence: Mapping[str, str] = field(default_factory=dict)
    """Keys of a model card on the original's licence."""
    texts: tuple[TextUse, ...] = ()
    """Empty: no data."""
    calibration: str = "none"
    """The data in a few words."""
    samples_given: bool = False
    """The samples were drawn by another run, of `qtool calibrate`."""
    missing_tokens: tuple[str, ...] = ()
    """Special tokens of the model that no sample has."""
    weight_bytes: int = 0
    source_bytes: int = 0
    num_weights: int = 0
    """Of the whole model, embedding and head included."""
    fallbacks: int = 0
    """Layers that were solved more simply than asked."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Means over the layers, by what they are errors of."""
    measured: Measured = field(default_factory=Measured)


def model_card(manifest: Manifest, source: str | None, about: Provenance | None = None) -> str:
    """Return the card of a checkpoint, Markdown with front matter.

    The source is the hub id or demo name of the original; None: a local model, which stays unnamed.
    """
    about = about or Provenance()
    demo = DEMO_MODELS.get(source or "")
    base = demo.hub_id if demo is not None else source
    licence = about.licence or ({"license": demo.licence} if demo is not None else {})
    strict = ""
    if about.num_weights:
        strict = (
            f", {8 * about.weight_bytes / about.num_weights:.2f} with embedding and head (strict)"
        )
    text = CARD_TEXT.format(
        title=base or "A local model",
        version=manifest.tool_version,
        count=len(manifest.layers),
        method=_method(manifest),
        bits=manifest.average_bits(),
        strict=strict,
        table=_table(_rows(manifest, base, licence, about)),
        kept=_kept(manifest),
        calibration=_calibration(about),
        measured=measured_section(about.measured),
        calibration_option=" --calibration CALIB_DIR" if about.samples_given else "",
        location=source or "MODEL",
        recipe=yaml.safe_dump(dict(manifest.recipe), sort_keys=False, allow_unicode=True).rstrip(),
        limits="\n".join(f"- {line}" for line in _limits(manifest, licence, about)),
    )
    front = yaml.safe_dump(_front(manifest, base, licence), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{text}"


def _front(manifest: Manifest, base: str | None, licence: Mapping[str, str]) -> dict[str, Any]:
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    tags = ["qtool", "quantized"]
    method = manifest.recipe.get("weights", {}).get("method")
    tags += [method] if method else []
    bits = {entry.scheme.num_bits for entry in manifest.layers.values()}
    tags += [f"{bits.pop()}-bit"] if len(bits) == 1 else []
    named = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return {**front, **licence, **named}


def _method(manifest: Manifest) -> str:
    return manifest.recipe.get("weights", {}).get("method") or "several methods"


def _rows(
    manifest: Manifest, base: str | None, licence: Mapping[str, str], about: Provenance
) -> list[tuple[str, str]]:
    """Return the lines of the table; only what is known."""
    rows = [("original", base or "a local model")]
    if licence:
        rows.append(("licence of the original", licence.get("license_name", licence["license"])))
    if about.weight_bytes:
        share = about.weight_bytes / max(about.source_bytes, 1)
        rows.append(("size", f"{gigabytes(about.weight_bytes)}, {share:.0%} of the original"))
    weights = manifest.recipe.get("weights", {})
    schemes = {entry.scheme for entry in manifest.layers.values()}
    groups = sorted({f"{one.group_size or 'rows'} along {one.group_dim}" for one in schemes})
    bits = sorted({one.num_bits for one in schemes})
    if schemes:
        rows.append(("bits of the codes", ", ".join(map(str, bits))))
        rows.append(("groups of", "; ".join(groups)))
    options = weights.get("options") or {}
    if options:
        said = ", ".join(f"{key} = {value}" for key, value in options.items())
        rows.append((f"options of {_method(manifest)}", said))
    inputs = {entry.activation for entry in manifest.layers.values() if entry.activation}
    widths = sorted({f"{each.num_bits} bits per {each.granularity}" for each in inputs})
    if widths:
        rows.append(("inputs of quantized linears, as they run", ", ".join(widths)))
    rows.append(("calibration data", about.calibration))
    rows += [(f"mean {name}", f"{value:.2e}") for name, value in about.errors.items()]
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])


def _kept(manifest: Manifest) -> str:
    """Return the table of what isn't quantized, after an empty line; nothing if all is."""
    rows = [(one.kind, one.why, str(len(one.names))) for one in kept_kinds(manifest.unquantized)]
    if not rows:
        return ""
    table = markdown_table(["not quantized", "why", "tensors"], rows, left=2)
    return f"\n\nStored as they were:\n\n{table}"


def _calibration(about: Provenance) -> str:
    if not about.texts:
        return "No data was used."
    rows = [
        (
            one.name,
            one.licence,
            "?" if one.samples is None else str(one.samples),
            "?" if one.tokens is None else str(one.tokens),
        )
        for one in about.texts
    ]
    return markdown_table(["text", "licence", "samples", "tokens"], rows, left=2)


def _limits(manifest: Manifest, licence: Mapping[str, str], about: Provenance) -> list[str]:
    """Return what whoever uses the model should know, as sentences."""
    lines = [
        "The format is qtool's: vLLM, llama.cpp and other engines don't read it.",
        "Answers differ from the original's. What was measured above holds for its texts and "
        "tasks; measure on your own before you rely on it.",
        "All limits of the original hold here too"
        + (", and so does its licence." if licence else "; its licence isn't known to qtool."),
    ]
    if not about.texts:
        lines.append("No calibration data was used: few bits without it lose much.")
    if about.missing_tokens:
        names = ", ".join(f"`{name}`" for name in about.missing_tokens)
        lines.append(f"No calibration sample has the special tokens {names}.")
    if about.fallbacks:
        lines.append(f"{about.fallbacks} layers were solved more simply than asked.")
    if any(entry.activation for entry in manifest.layers.values()):
        lines.append("Its inputs are quantized too: the decode runner doesn't take it.")
    return lines
