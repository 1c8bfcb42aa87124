"""docs/compatibility.md: families of models, versions and engines that work with qtool."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import qtool.runtime.backends
from qtool import plugins
from qtool.modeling.families import families, load_family
from qtool.runtime.backends._choose import load_backend
from qtool.runtime.decode.read_model import FAMILIES as DECODED

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"^(?P<name>[\w.-]+)(?P<bounds>[^;]*)")
TRIED = ROOT / "docs/families.json"
OLD_LINE = ROOT / "tests/versions/transformers-4.57.txt"


def page(note: str) -> str:
    """Return docs/compatibility.md."""
    lines = [TOP.format(note=note), "| model type | folds | decode runner |"]
    lines += ["|---|---|---|", *map(family_row, families())]
    lines += ["", FAMILIES.format(working=len(working())), "", *tried_rows(), "", VERSIONS_TITLE]
    lines += ["", "| package | allowed | tested | for |", "|---|---|---|---|"]
    lines += [*version_rows(), "", VERSIONS.format(old=old_transformers()), ""]
    lines += ["| backend | runs here if |", "|---|---|"]
    lines += [f"| `{name}` | {BACKENDS[name]} |" for name in backends()]
    return "\n".join([*lines, "", ENGINES])


def family_row(name: str) -> str:
    """Return what works with one model type."""
    adapter = load_family(name)
    cells = (yes(adapter.producers), yes(name in DECODED))
    return f"| `{name}` | " + " | ".join(cells) + " |"


def tried() -> dict[str, dict[str, Any]]:
    """Return what was found of each model type that transformers has; tests/every_family.py."""
    found: dict[str, dict[str, Any]] = json.loads(TRIED.read_text(encoding="utf-8"))
    return found


def working() -> list[str]:
    """Return the model types of which a tiny copy works."""
    return [name for name, found in tried().items() if "share" in found]


def tried_rows() -> list[str]:
    """Return what works in one paragraph, and a table of what doesn't."""
    by_share = ", ".join(f"`{name}`" for name in working())
    rows = [f"{by_share}.", "", "| model type | what doesn't work |", "|---|---|"]
    for name, found in tried().items():
        for key, what in WHAT.items():
            if key in found:
                reason = found[key].replace("|", "\\|").replace("<", "&lt;")
                rows.append(f"| `{name}` | {what}: {reason} |")
    return rows


def yes(value: object) -> str:
    """Return a cell."""
    return "yes" if value else "no"


def version_rows() -> list[str]:
    """Return a row for each package that pyproject.toml asks users to have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = dict.fromkeys(project["dependencies"], "everything")
    for extra, packages in extras.items():
        if extra not in ("dev", "docs", "all"):
            wanted |= {text: f"extra `{extra}`" for text in packages if text not in wanted}
    pins = pinned()
    rows = [f"| Python | {project['requires-python']} | 3.11, 3.12 | everything |"]
    for text, purpose in wanted.items():
        found = BOUND.match(text)
        assert found is not None, text
        name, bounds = found["name"], found["bounds"].strip()
        rows.append(f"| {name} | {bounds} | {pins.get(plain(name), 'not pinned')} | {purpose} |")
    return rows


def pinned() -> dict[str, str]:
    """Return the versions that CI uses, by plain name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {plain(name): version for name, version in pairs}


def plain(name: str) -> str:
    """Return a package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def old_transformers() -> str:
    """Return the version of the older line of transformers that is tested."""
    found = re.search(r"^transformers==(\S+)$", OLD_LINE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def backends() -> tuple[str, ...]:
    """Return the names of the backends, the preferred one first."""
    found = plugins.names(qtool.runtime.backends)
    return tuple(sorted(found, key=lambda name: -load_backend(name).priority))


WHAT = {
    "refused": "refused",
    "without calibration": "without calibration data only",
    "no copy": "not tried, there is no tiny copy",
}
BACKENDS = {
    "cuda": "there is a CUDA card of compute capability 8.0 or newer, and CuPy",
    "cpu": "the model is on the CPU, and there is a C compiler at the first call, or was one where "
    "the wheel was built; weights stay packed (bit planes in groups of 16 inputs and more)",
    "dense": "always; each weight is dequantized at its first call, so memory is as in 16 bits",
    "reference": "always; the definition, dequantized at every call: slow",
}
TOP = """# What works with what

{note}
## Models

Decoder-only causal language models of transformers, in float16, bfloat16 or float32, as a local
directory, a hub id or a `.gguf` file. These have a file in `qtool/modeling/families`, so that
calibration also compensates errors that the residual stream carries:
"""
FAMILIES = """- *Folds*: `fold` in a recipe works ([folding.md](folding.md)).
- *Decode runner*: `generate` on a card replays one CUDA graph per token; other families run
  transformers' own loop.

Other model types are looked at by themselves: blocks in one list, alike or not, made of linears,
experts and what else there is. Text decoders of multimodal models are quantized, and the rest of
the model is kept. In 16 bit stay by default, and are listed with the reason in the checkpoint
(`unquantized` in config.json): embedding and head, unless the recipe has a section for them;
routers and shared experts; convolutions; and of recurrent layers (Mamba, gated delta rules, short
convolutions) what is fragile, such as `out_proj`, `x_proj`, `dt_proj`. To quantize one of these,
name it in an override:

```yaml
weights:
  overrides:
    - {{match: "*.mixer.out_proj", scheme: {{num_bits: 8}}}}
```

If more than a tenth of the blocks would stay in 16 bit for another reason, that is an error before
the work begins, unless an override says `skip: true`. To see what becomes of yours:

```
qtool quantize --method rtn --bits 4 MODEL OUT_DIR --dry-run
```

Not supported: encoder-decoders, remote code, pickled weights, models that are quantized already.
[limitations.md](limitations.md#models) has the whole list. A family of your own:
[adding-a-model.md](adding-a-model.md).

### Every model type

Of each causal language model that transformers 5.23 has, a tiny copy with random weights was
quantized in 4 bits without data and with `gptq`, loaded, compared with what its files say, asked
for tokens and saved again. A family that works so runs; how good it is after quantization only its
real weights can say. These {working} work:
"""
VERSIONS_TITLE = "## Versions"
VERSIONS = """*Tested* are the versions of `constraints.txt`; the lowest allowed ones run the
command line (`make test-floors`), and transformers {old} loads and executes models
(`make test-versions`). CI runs all with the newest; with transformers {old} it loads, generates,
saves, adapts and scores (`make test-old`); with Python 3.12 it runs what needs no torch
(`make test-3-12`). Linux and macOS.

## Engines"""
ENGINES = """| program | quantized model |
|---|---|
| transformers | [yes](quickstart.md#load-it-from-python), without importing qtool |
| ... in particular | `AutoModel`, `pipeline`, `dtype=`, `device_map`, assisted generation |
| ... and back | `save_pretrained`, `push_to_hub` |
| transformers: `torch.compile` | yes; one node per linear |
| transformers: `Trainer` | `evaluate`; `train` of adapters and of what isn't quantized |
| PEFT | LoRA (`get_peft_model`, `PeftModel`), `all-linear` too; merging is refused |
| lm-eval | yes: `qtool eval --tasks` ([evaluation.md](evaluation.md)), `lm_eval --model hf` |
| vLLM | yes, by a plug-in that it finds by itself ([vllm.md](vllm.md)) |
| llama.cpp, TensorRT-LLM, Ollama | no: nothing is exported to their formats yet |
| several cards | [under `torchrun`](several-cards.md); `device_map` isn't tested |

### Found without an import

Where qtool is installed, `import torch` calls it, by the entry point that torch has for
extensions. That takes a millisecond and sets an import hook, nothing else; when transformers meets
the first checkpoint of qtool, the rest is imported. To turn it off set
`TORCH_DEVICE_BACKEND_AUTOLOAD=0`; then `import qtool` in the program does the same, before or after
transformers. [ADR 0020](adr/0020-found-without-an-import.md) has the reasons.

Models that *other* tools have quantized (compressed-tensors, GPTQ, AWQ, bitsandbytes, GGUF) can
be measured beside yours: [comparing.md](comparing.md).
"""
