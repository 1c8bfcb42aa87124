"""The same request gives the same bytes, whatever becomes of the code between.

The digests stand for numbers that solvers computed, so they hold for one kind of processor and one
torch: where a probe of the arithmetic differs from the recorded one, nothing can be compared.
`python -m tests.golden.test_same_bytes` records them anew, which a change of a solver must say why.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch

from qtool import pipeline
from qtool.core.column_loop import walk_columns
from qtool.core.grids import pick_affine
from qtool.core.native import columns as native_columns
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from tests import families

RECORDED = Path(__file__).parent / "same_bytes.json"
OPTIONS = {"rtn": {}, "gptq": {}, "bcq": {"rounds": 5, "iterations": 2}}
GROUP_DIMS = ["in_features", "out_features"]
CASES = [
    f"{method}-{group_dim}-{data}"
    for method in OPTIONS
    for group_dim in GROUP_DIMS
    for data in ("data-free", "calibrated")
    if (method, data) != ("gptq", "data-free")
]
CASES.append("bcq-adadim-calibrated")
SCHEME: dict[str, object] = {"num_bits": 3, "group_size": 32}
LAYERS_BEFORE_THE_STOP = 9


def recipe(case: str, text: Path):
    method, group_dim, data = case.split("-", 2)
    weights: dict[str, object] = {"method": method, "options": OPTIONS[method]}
    if group_dim == "adadim":
        weights |= {"scheme": SCHEME, "choose": {"group_dim": GROUP_DIMS}}
    else:
        weights["scheme"] = {**SCHEME, "group_dim": group_dim}
    sections: dict[str, object] = {"weights": weights}
    if data == "calibrated":
        sections["calibration"] = {"dataset": str(text), "num_samples": 6, "sequence_length": 64}
    return recipe_from_mapping(sections)


def probe(model: Path) -> str:
    """Return a digest of the source and of what this processor makes of products and factors."""
    digest = hashlib.sha256((model / "model.safetensors").read_bytes())
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(96, 64, generator=generator, dtype=dtype)
        gram = x.T @ x
        for value in (gram, torch.linalg.cholesky(gram), x.exp().sum(0), torch.linalg.inv(gram)):
            digest.update(value.contiguous().numpy().tobytes())
    # Without a compiler solvers run by torch alone, and by another one they round elsewhere.
    work, matrix, rows = torch.randn(3, 64, 64, generator=generator)
    tables = (rows.abs() + 0.5, rows.round(), torch.full((1,), 7.0))
    levels = walk_columns(pick_affine, work, matrix / 64, tables)[1]
    digest.update(levels.numpy().tobytes() + bytes([native_columns.has_native_loop()]))
    return digest.hexdigest()


def digest(out_dir: Path) -> str:
    return hashlib.sha256((out_dir / "model.safetensors").read_bytes()).hexdigest()


def quantize_twice(model: Path, out_dir: Path, chosen) -> None:
    """Quantize, stopped when some layers are finished, and go on."""

    class StoppedError(Exception):
        pass

    def stop(*_):
        if len(list(out_dir.parent.glob("*/layers/*"))) >= LAYERS_BEFORE_THE_STOP:
            raise StoppedError

    with pytest.raises(StoppedError):
        pipeline.quantize(Location(model), out_dir, chosen, emit=stop)
    pipeline.quantize(Location(model), out_dir, chosen, resume=True)


def recorded_here(model: Path) -> dict[str, str]:
    """Return the digests; skip where another processor or torch recorded them."""
    expected = json.loads(RECORDED.read_text(encoding="utf-8"))
    if probe(model) != expected["probe"]:
        pytest.skip("digests were recorded with another processor or torch")
    return expected["digests"]


@pytest.fixture(scope="module")
def recorded(llama):
    return recorded_here(llama)


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_has_the_recorded_bytes(llama, text_file, tmp_path, recorded, case):
    pipeline.quantize(Location(llama), tmp_path / "out", recipe(case, text_file))
    assert digest(tmp_path / "out") == recorded[case]


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_has_the_recorded_bytes(llama, text_file, tmp_path, recorded, case):
    quantize_twice(llama, tmp_path / "out", recipe(case, text_file))
    assert digest(tmp_path / "out") == recorded[case]


def record() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        families.build("llama").save_pretrained(root / "model")
        families.save_tokenizer(root / "model")
        text = root / "words.txt"
        text.write_text(families.text(600), encoding="utf-8")
        digests = {}
        for case in CASES:
            pipeline.quantize(Location(root / "model"), root / case, recipe(case, text))
            digests[case] = digest(root / case)
        values = {"probe": probe(root / "model"), "digests": digests}
    RECORDED.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
