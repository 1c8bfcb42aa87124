"""Whole checkpoints by native steps: groups either way, rows of unlike bits, weights held once."""

import ctypes
import gc
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from qtool import pipeline
from qtool.core.native import building
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.cpu.decode_step import NativeStep
from qtool.runtime.backends.cpu.packing import PACKED_WEIGHTS, PackedWeight
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.modules import QuantizedLinear, TiedHead
from qtool.scheme import GROUP_DIMS
from tests import families
from tests.runtime_decode.models import prompt

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="there is no C compiler")
CPU = torch.device("cpu")


def load(directory: Path, backend: str):
    with use_backend(backend):
        return load_model(Location(directory), device=CPU, dtype=torch.float32).model


def native_runner(model) -> DecodeRunner:
    module = next(each for each in model.modules() if isinstance(each, QuantizedLinear))
    weights = weights_of(model)
    return DecodeRunner(weights, module.choose_backend().decode_ops(weights), max_length=64)


@torch.no_grad()
def check_steps(directory: Path) -> DecodeRunner:
    """Compare native steps with the reference's module by module; return what took them."""
    ids = prompt(1, 14)
    with use_backend("reference"):
        expected = load(directory, "reference")(ids).logits[0, 8:]
    runner = native_runner(load(directory, "cpu"))
    assert isinstance(runner.captured.whole, NativeStep)
    logits = [runner.prefill(ids[:, :9]).clone()]
    logits += [runner.step(token).clone() for token in ids[:, 9:].T]
    got = torch.cat(logits)
    assert (got - expected).norm() <= 2e-4 * expected.norm()
    return runner


def packed_of(weights) -> list[PackedWeight]:
    layers = [(*layer.qkv, layer.output, *layer.gate_up, layer.down) for layer in weights.layers]
    return [one for layer in layers for one in layer if isinstance(one, PackedWeight)]


def test_groups_that_were_chosen_either_way_decode_natively(llama, text_file, tmp_path):
    recipe = recipe_from_mapping(
        {
            "calibration": {"dataset": str(text_file), "num_samples": 4, "sequence_length": 32},
            "weights": {
                "method": "bcq",
                "scheme": {"num_bits": 3, "group_size": 32},
                "options": {"rounds": 2, "iterations": 1},
                "choose": {"group_dim": list(GROUP_DIMS)},
            },
        }
    )
    manifest = pipeline.quantize(Location(llama), tmp_path / "chosen", recipe)
    chosen = Counter(layer.entry.scheme.group_dim for layer in manifest.layers)
    assert set(chosen) == set(GROUP_DIMS), "else this test shows nothing"
    runner = check_steps(tmp_path / "chosen")
    assert len(packed_of(runner.weights)) == sum(chosen.values())


def test_rows_of_unlike_bits_in_embedding_and_head(mixed_tables):
    runner = check_steps(mixed_tables)
    weights = runner.weights
    assert isinstance(weights.embedding, PackedWeight)
    assert isinstance(weights.head, PackedWeight)
    is_tied = isinstance(load(mixed_tables, "cpu").lm_head, TiedHead)
    assert (weights.head is weights.embedding) == is_tied, "a tied table is there once"


def anonymous_bytes() -> int:
    """Return the memory of this process that no file has, but for what malloc merely keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def file_bytes_there(path: Path) -> int:
    """Return how much of a file's mappings is in memory."""
    found, is_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_it = line.endswith(str(path))
        elif is_it and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """Return a checkpoint of 21 MB, tied table and all, whose groups run either way."""
    folder = tmp_path_factory.mktemp("larger")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    model = families.build("llama", tied=True, vocab_size=8192, **sizes)
    model.save_pretrained(folder / "model")
    families.save_tokenizer(folder / "model")
    scheme = {"num_bits": 8, "group_size": 128}
    along_rows = {"match": "*.down_proj", "scheme": {"group_dim": "out_features"}}
    weights = {"method": "rtn", "scheme": scheme, "overrides": [along_rows]}
    recipe = {"weights": weights, "embedding": {"method": "rtn", "scheme": scheme}}
    pipeline.quantize(Location(folder / "model"), folder / "packed", recipe_from_mapping(recipe))
    return folder / "packed"


@pytest.mark.skipif(sys.platform != "linux", reason="the system doesn't list its memory")
@torch.no_grad()
def test_a_model_that_decodes_is_in_memory_once(larger):
    native_runner(load(larger, "cpu")).prefill(prompt(1, 4))  # what is made once for all models
    before, packed = anonymous_bytes(), set(PACKED_WEIGHTS)
    model = load(larger, "cpu")
    runner = native_runner(model)
    first = runner.prefill(prompt(1, 4)).argmax(-1)
    runner.greedy(first, 8)
    streams = sum(one.num_bytes for key, one in PACKED_WEIGHTS.items() if key not in packed)
    size = (larger / "model.safetensors").stat().st_size
    assert 0.9 * size < streams < 1.15 * size, "what is packed is as large as its file"
    there, cache = file_bytes_there(larger / "model.safetensors"), 2 * runner.state.keys.nbytes
    assert 0 < there < 0.15 * size, "parts wait in their file"
    assert anonymous_bytes() - before < 1.15 * streams + cache
    assert model.state_dict(), "it was there all the time"
