"""Checkpoints with something wrong: refused in one line, or loaded as they were written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from qtool import pipeline
from qtool.checkpoint import writer
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import QtoolError
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from tests.helpers import recipe
from tests.robustness.child import is_ours, run_apart
from tests.robustness.fuzzing import Change, fuzz, sizes
from tests.robustness.safetensors_files import damaged_safetensors
from tests.robustness.values import changed_trees, damaged, json_bytes, one_of_two

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROMPT = torch.arange(3, 23).unsqueeze(0)
TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """Return a checkpoint of a tied model with a quantized table, in one file."""
    out_dir = tmp_path_factory.mktemp("good") / "checkpoint"
    pipeline.quantize(Location(tiny("llama", tied=True)), out_dir, recipe(embedding=TABLE))
    return out_dir


@pytest.fixture(scope="module")
def sharded(llama, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("sharded") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "MAX_SHARD_BYTES", 25_000)
        pipeline.quantize(Location(llama), out_dir, recipe())
    return out_dir


def says_whose(directory: Path) -> bool | None:
    """Return whether config.json names qtool; None: it can't be read."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "qtool"


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model.eval()(PROMPT, use_cache=False).logits
    return logits


def read_all(directory: Path) -> bool:
    """Return whether the reader takes a checkpoint, all of its tensors included."""
    try:
        reader = CheckpointReader(directory)
        for name in reader.names():
            reader.load(name)
    except QtoolError:
        return False
    json.dumps(reader.manifest.to_config(), allow_nan=False)
    return True


def transformers_logits(directory: Path) -> Tensor | None:
    """Return the logits of what a program loads, None if transformers stops before qtool is asked.

    Whatever else it raises goes on.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except Exception as error:
        if is_ours(error):
            raise
        return None
    return logits_of(model)


def opened(change: Change, good: Path, target: Path, expected: Tensor) -> str | None:
    """Open a changed checkpoint in all ways, and return what is wrong with what was taken."""
    directory = change.applied(good, target)
    whose, taken = says_whose(directory), read_all(directory)
    if whose is False and taken:
        return "the reader takes what isn't qtool's"
    # If nothing says that it is qtool's, transformers doesn't ask: then as `eval` loads it.
    logits = transformers_logits(directory) if whose else None
    if logits is None:
        logits = logits_of(load_model(Location(directory), dtype=torch.float32).model)
    if torch.equal(logits, expected) or (taken and not change.keeps_values):
        return None
    return "loads other weights" + ("" if taken else ", the reader refuses")


def check_with(good: Path, target: Path):
    """Return the check of one change; the model's classes are imported once, here."""
    expected = transformers_logits(good)
    assert expected is not None

    def check(change: Change) -> str | None:
        outcome = run_apart(opened, change, good, target, expected)
        return outcome.complaint or outcome.value

    return check


def manifests(good: Path) -> st.SearchStrategy[Change]:
    """Draw changes to the manifest: two layers are enough to change."""
    config: dict[str, Any] = json.loads((good / CONFIG).read_text())
    layers = config["quantization_config"]["layers"]
    few = {name: layers[name] for name in (min(layers), max(layers), "model.embed_tokens")}
    few |= {name: entry for name, entry in layers.items() if "shared_with" in entry}
    rest = {name: entry for name, entry in layers.items() if name not in few}

    def change(drawn: tuple[str, Any]) -> Change:
        what, manifest = drawn
        if isinstance(manifest, dict) and isinstance(manifest.get("layers"), dict):
            manifest = {**manifest, "layers": {**rest, **manifest["layers"]}}
        content = json_bytes({**config, "quantization_config": manifest})
        return Change(f"manifest: {what}", {CONFIG: content})

    digests = dict(list(config["quantization_config"].get("digests", {}).items())[:2])
    small = {**config["quantization_config"], "layers": few, "digests": digests}
    others: list[Any] = [None, {}, [], "x", 5, {"quant_method": "gptq"}]
    replaced = st.sampled_from(others).map(lambda value: (f"all replaced by {value!r}", value))
    return one_of_two(changed_trees(small), replaced).map(change)


def files(good: Path) -> st.SearchStrategy[Change]:
    """Draw damage to the weights and to the bytes of config.json."""
    weights = damaged_safetensors((good / WEIGHTS).read_bytes()).map(
        lambda drawn: Change(drawn[0], {WEIGHTS: drawn[1]}, drawn[2])
    )
    config = damaged((good / CONFIG).read_bytes()).map(
        lambda drawn: Change(f"config.json: {drawn[0]}", {CONFIG: drawn[1]})
    )
    return one_of_two(weights, config)


def indices(good: Path) -> st.SearchStrategy[Change]:
    """Draw changes to the index and lost shards."""
    index = json.loads((good / INDEX).read_text())
    shards = sorted(path.name for path in good.glob("*.safetensors"))
    trees = changed_trees(index).map(
        lambda drawn: Change(f"index: {drawn[0]}", {INDEX: json_bytes(drawn[1])})
    )
    bytes_ = damaged((good / INDEX).read_bytes()).map(
        lambda drawn: Change(f"index: {drawn[0]}", {INDEX: drawn[1]})
    )
    lost = st.sampled_from([*shards, INDEX]).map(lambda name: Change(f"no {name}", {name: None}))
    swapped = st.permutations(shards).map(lambda order: _swapped(good, shards, order))
    return one_of_two(trees, bytes_ | lost | swapped)


def _swapped(good: Path, shards: list[str], order: list[str]) -> Change:
    contents = {new: (good / old).read_bytes() for old, new in zip(shards, order, strict=True)}
    return Change(f"shards as {[name[6:11] for name in order]}", contents)


@sizes(40)
def test_a_manifest_is_obeyed_or_refused(size, good, tmp_path):
    fuzz(manifests(good), check_with(good, tmp_path / "changed"), size)


@sizes(40)
def test_weights_load_as_they_were_written_or_are_refused(size, good, tmp_path):
    fuzz(files(good), check_with(good, tmp_path / "changed"), size)


@sizes(20)
def test_shards_load_as_they_were_written_or_are_refused(size, sharded, tmp_path):
    fuzz(indices(sharded), check_with(sharded, tmp_path / "changed"), size)
