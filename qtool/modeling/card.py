"""The README.md of a checkpoint: what it is and how to run it."""

from qtool.checkpoint.manifest import Manifest

TEMPLATE = """---
{base}library_name: transformers
tags: [qtool, quantized]
---
# Quantized with qtool {version}

{count} layers, {bits:.2f} bits per quantized weight with scales and offsets.

```python
import qtool  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```

Without `import qtool` transformers ignores the quantization and loads random weights.
`qtool inspect` prints the layers, `qtool eval` the perplexity, `qtool bench` the speed.
"""


def model_card(manifest: Manifest, source: str | None) -> str:
    """Return the card of a checkpoint; `source` is the hub id of the original, if it has one."""
    base = f"base_model: {source}\n" if source and not source.startswith("demo:") else ""
    return TEMPLATE.format(
        base=base,
        version=manifest.tool_version,
        count=len(manifest.layers),
        bits=manifest.average_bits(),
    )
