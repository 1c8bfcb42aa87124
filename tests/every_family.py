"""What must hold for every family: one tiny copy, quantized, loaded, run, saved again.

`python -m tests.every_family` tries all that transformers has, or those named, and records what is
refused, and why: docs/compatibility.md shows it.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import pipeline
from qtool.core.experts import expert_name
from qtool.data.calibration import CalibrationSet
from qtool.errors import QtoolError
from qtool.modeling.config import auto_class
from qtool.modeling.locate import Location
from qtool.modeling.source import ModelSource, open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.runtime.backends._choose import use_backend
from tests import families, mixtures, tiny
from tests.helpers import QUICK_BCQ
from tests.stored import stored_weights

RECORDED = Path(__file__).parents[1] / "docs/families.json"
LARGE = {"deepseek_v4": ("*_hc.fn", "*.position_bias")}
"""What takes more than a tenth of the blocks of a tiny copy, and little of a real model."""
SUMS_ROUNDED = 2e-3
"""Part of the logits that the backend chosen for a CPU may change: it rounds sums of inputs."""
PROMPT = torch.arange(3, 23).unsqueeze(0)
OPTIONS: Mapping[str, Mapping[str, Any]] = {"rtn": {}, "gptq": {}, "bcq": QUICK_BCQ}


def recorded() -> dict[str, dict[str, Any]]:
    """Return what was found of each family: a share, and what is refused or can't be tried."""
    found: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def samples() -> CalibrationSet:
    """Return six random samples of 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=generator)
    return CalibrationSet(tuple(tokens), {"dataset": "random"})


def save(family: str, directory: Path) -> Path:
    """Save a tiny copy with a tokenizer; return where."""
    tiny.build(family).save_pretrained(directory)
    families.save_tokenizer(directory)
    return directory


def load(directory: Path, backend: str | None = "dense") -> Any:
    """Load a model, quantized or not, as its configuration names it; in float32.

    Products are torch's unless another backend is named, or None, which chooses: what is compared
    is what was loaded.
    """
    from transformers import AutoConfig

    kind = auto_class(AutoConfig.from_pretrained(directory))
    with use_backend(backend):
        return kind.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return what it says of a prompt."""
    found: Tensor = model(PROMPT).logits
    return found


def quantize(family: str, method: str, place: Path) -> None:
    """Quantize a tiny copy under `place`, from `source` to `out`: 4 bits, or 3 with data."""
    source = save(family, place / "source")
    num_bits = 4 if method == "rtn" else 3
    scheme = {"num_bits": num_bits, "group_size": 32}
    weights: dict[str, Any] = {"method": method, "scheme": scheme, "options": OPTIONS[method]}
    weights["overrides"] = [{"match": match, "skip": True} for match in LARGE.get(family, ())]
    recipe: dict[str, Any] = {"weights": weights}
    if method != "rtn":
        recipe["calibration"] = {"num_samples": 6, "sequence_length": 16}
    drawn = None if method == "rtn" else samples()
    pipeline.quantize(Location(source), place / "out", recipe_from_mapping(recipe), samples=drawn)


def check(family: str, method: str, place: Path) -> None:
    """Check all that must hold."""
    quantize(family, method, place)
    original, quantized = load(place / "source"), load(place / "out")
    kept = dict(quantized.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.equal(kept[name], buffer), name
    weights = stored_weights(place / "out")
    put(original, weights)
    said, expected = logits(quantized), logits(original)
    assert bool(torch.isfinite(said).all())
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    chosen = load(place / "out", backend=None)
    assert float((logits(chosen) - said).norm()) <= SUMS_ROUNDED * float(said.norm())
    check_generation(chosen)
    quantized.save_pretrained(place / "again")
    torch.testing.assert_close(logits(load(place / "again")), said, rtol=1e-5, atol=1e-6)
    check_manifest(open_source(Location(place / "source")), place / "out")


def put(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights of an original by what its checkpoint means."""
    for name, weight in weights.items():
        with torch.no_grad():
            if expert_name(name):
                mixtures.fused_weight(model, name).copy_(weight)
            else:
                module = model.get_submodule(name)
                is_turned = type(module).__name__ == "Conv1D"
                module.weight.copy_(weight.T if is_turned else weight)


def check_generation(model: Any) -> None:
    """Check that it answers a prompt with more tokens."""
    tokens = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=2, do_sample=False
    )
    assert torch.equal(tokens[:, : PROMPT.shape[1]], PROMPT)
    assert tokens.shape[1] > PROMPT.shape[1]


def check_manifest(source: ModelSource, out: Path) -> None:
    """Check that each matrix of the original is quantized, or there with a reason."""
    section = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    listed = {f"{name}.weight" for name in section["layers"]} | {*section["unquantized"]}
    matrices = {name for name in source.names() if len(source.spec(name).shape) > 1}
    assert matrices <= listed
    assert all(section["unquantized"].values())


def share_quantized(source: ModelSource, weights: Mapping[str, Tensor]) -> float:
    """Return which part of the weights of the blocks is quantized."""
    total = sum(prod(source.spec(name).shape) for name in source.block_tensors())
    return sum(weight.numel() for weight in weights.values()) / total


def why_not(family: str, method: str, place: Path) -> str | None:
    """Return why a family is refused, its paths left out; None: it isn't."""
    try:
        quantize(family, method, place)
    except QtoolError as error:
        path = rf"{re.escape(str(place))}/\w+"
        found = re.sub(path, "the model", re.sub(f"{path}: ", "", str(error)))
        return found.partition(". ")[0]
    return None


def has_copy(family: str) -> str | None:
    """Return why there is no tiny copy of a family to try; None: there is one."""
    try:
        tiny.build(family)
    except Exception as error:  # noqa: BLE001 - of as many kinds as there are families
        return " ".join(str(error).split()).partition(". ")[0]
    return None


def record(families_to_try: Sequence[str]) -> None:
    """Try families and write what is found into `RECORDED`; all take a few minutes."""
    found = recorded() if RECORDED.exists() else {}
    for family in families_to_try:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = _tried(family, Path(folder))
        sys.stderr.write(f"{family} {found[family]}\n")
    ordered = {name: found[name] for name in tiny.families() if name in found}
    RECORDED.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def _tried(family: str, folder: Path) -> dict[str, Any]:
    missing = has_copy(family)
    if missing is not None:
        return {"no copy": missing}
    refused = why_not(family, "rtn", folder)
    if refused is not None:
        return {"refused": refused}
    share = share_quantized(
        open_source(Location(folder / "source")), stored_weights(folder / "out")
    )
    found: dict[str, Any] = {"share": round(share, 2)}
    shutil.rmtree(folder / "out")
    refused = why_not(family, "gptq", folder)
    return found if refused is None else {**found, "without calibration": refused}


if __name__ == "__main__":
    record(sys.argv[1:] or tiny.families())
