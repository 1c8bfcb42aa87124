"""Model directories with something wrong: refused in one line, or quantized as they load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from qtool import pipeline
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.steps.plan import make_plan
from tests.helpers import recipe
from tests.robustness.child import run_apart
from tests.robustness.fuzzing import Change, fuzz, sizes
from tests.robustness.safetensors_files import damaged_safetensors
from tests.robustness.values import changed_trees, damaged, json_bytes, one_of_two

ADAPTER = "adapter_config.json"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROMPT = torch.arange(3, 23).unsqueeze(0)
FAMILIES = ("llama", "gpt2", "stablelm")
ALMOST = 0.1
"""What 8 bits may change of the logits, relatively; other weights change all of them."""
QUANTIZED: tuple[Any, ...] = (
    *(None, {}, [], False, "gptq", 5, {"quant_method": None}, {"quant_method": "qtool"}),
    *({"quant_method": "gptq"}, {"quant_method": 5}, {"bits": 4}, {"quant_method": "fp8"}),
)
MORE_KEYS = {
    "auto_map": {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"},
    "quantization_config": {"quant_method": "gptq"},
    "rope_scaling": {"rope_type": "default"},
    "is_encoder_decoder": False,
    "torch_dtype": "float16",
    "n_layer": 2,
    "num_layers": 2,
    "num_local_experts": 2,
}


@torch.inference_mode()
def logits(directory: Path) -> Tensor:
    """Return the logits of a directory, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: Tensor = model(PROMPT, use_cache=False).logits
    return found


def planned(change: Change, good: Path, target: Path) -> None:
    """Open and plan: what `--dry-run` does."""
    make_plan(open_source(Location(change.applied(good, target))), recipe(num_bits=8))


def quantized(change: Change, good: Path, target: Path) -> str | None:
    """Quantize a changed source that was opened, and compare the result with it."""
    source = change.applied(good, target)
    out_dir = target.with_name("out")
    pipeline.quantize(Location(source), out_dir, recipe(num_bits=8), overwrite=True)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8-sig"))
    if config.get("quantization_config") == {}:  # transformers stumbles over it
        del config["quantization_config"]
        (source / CONFIG).write_text(json.dumps(config))
    (source / ADAPTER).unlink(
        missing_ok=True
    )  # with PEFT installed, transformers wants its weights
    try:
        expected = logits(source)
    except Exception as error:  # noqa: BLE001 - transformers raises many unrelated types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"quantized, and transformers can't load the source: {reason[:120]}"
    found = logits(out_dir)
    if found.shape != expected.shape:
        return "quantized to another shape"
    if not torch.equal(found.isnan(), expected.isnan()):
        return "quantized, and has other NaN"
    difference = (found - expected).nan_to_num(0, 0, 0).norm()
    close = difference <= ALMOST * expected.nan_to_num(0, 0, 0).norm()
    return None if close else "quantized to another model"


def check_with(good: Path, tmp_path: Path, every: int):
    """Return the check of one change; of those that can be opened each `every`th is quantized."""
    target = tmp_path / "changed"
    assert quantized(Change("nothing"), good, target) is None  # and imports what children need
    taken = 0

    def check(change: Change) -> str | None:
        nonlocal taken
        outcome = run_apart(planned, change, good, target)
        if outcome.kind != "result":
            return outcome.complaint
        taken += 1
        if taken % every:
            return None
        outcome = run_apart(quantized, change, good, target)
        return outcome.complaint or outcome.value

    return check


def configurations(good: Path) -> st.SearchStrategy[Change]:
    """Draw changes to config.json: null, wrong types, numbers that can't be, missing keys."""
    config: dict[str, Any] = json.loads((good / CONFIG).read_text())
    trees = changed_trees({**config, **MORE_KEYS}) | changed_trees(config)
    changed = trees.map(lambda drawn: Change(drawn[0], {CONFIG: json_bytes(drawn[1])}))
    quantization = st.sampled_from(QUANTIZED).map(
        lambda value: Change(
            f"quantization_config={value!r}",
            {CONFIG: json_bytes({**config, "quantization_config": value})},
        )
    )
    bytes_ = damaged((good / CONFIG).read_bytes()).map(
        lambda drawn: Change(f"config.json: {drawn[0]}", {CONFIG: drawn[1]})
    )
    return one_of_two(changed, quantization | bytes_)


def weight_files(good: Path) -> st.SearchStrategy[Change]:
    """Draw damage to the weights."""
    return damaged_safetensors((good / WEIGHTS).read_bytes()).map(
        lambda drawn: Change(drawn[0], {WEIGHTS: drawn[1]})
    )


@st.composite
def layouts(draw: st.DrawFn, good: Path, single: bytes) -> Change:
    """Draw what lies beside the weights: another save, adapters, leftovers, a damaged index."""
    index = json.loads((good / INDEX).read_text())
    what, tree = draw(changed_trees(index))
    name, content = draw(
        st.sampled_from(
            [
                (INDEX, json_bytes(tree)),
                (INDEX, json_bytes(tree)),
                (INDEX, draw(damaged((good / INDEX).read_bytes()))[1]),
                (INDEX, None),
                (WEIGHTS, single),
                (WEIGHTS, b""),
                (ADAPTER, b'{"peft_type": "LORA"}'),
                ("adapter_model.safetensors", single),
                ("consolidated.safetensors", single),
                ("pytorch_model.bin", b"\x80\x02}q\x00."),
                ("generation_config.json", b"[1]"),
                ("tokenizer_config.json", b"{"),
                ("tokenizer.json", None),
                ("model-00001-of-00003.safetensors", None),
            ]
        )
    )
    done = f"{name}: {'gone' if content is None else what if name == INDEX else repr(content[:40])}"
    return Change(done, {name: content})


@pytest.fixture(scope="module")
def sharded(llama, tmp_path_factory):
    """Return the tiny llama in shards with an index."""
    from transformers import AutoModelForCausalLM

    from tests import families

    directory = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(directory, max_shard_size="60KB")
    families.save_tokenizer(directory)
    return directory


@sizes(15)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_is_obeyed_or_refused(size, family, tiny, tmp_path):
    good = tiny(family, tied=family == "gpt2")
    fuzz(configurations(good), check_with(good, tmp_path, every=3), size)


@sizes(10)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_as_transformers_does_or_refused(size, family, tiny, tmp_path):
    good = tiny(family, tied=family == "gpt2")
    fuzz(weight_files(good), check_with(good, tmp_path, every=2), size)


@sizes(15)
def test_files_count_as_they_do_for_transformers(size, llama, sharded, tmp_path):
    single = (llama / WEIGHTS).read_bytes()
    fuzz(layouts(sharded, single), check_with(sharded, tmp_path, every=1), size)
