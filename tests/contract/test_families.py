"""Every model family: quantize a tiny random model, reload it, compare."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.modeling.discover import adapter_of
from qtool.modeling.families import families as known_families
from qtool.modeling.families import load_family
from qtool.modeling.locate import Location
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, TiedHead
from tests import families
from tests.helpers import dequantized, recipe

ADAPTERS = known_families()
WITHOUT_A_FILE = ("bloom", "gemma3_text", "stablelm")
TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}
PROMPT = torch.arange(3, 23).unsqueeze(0)


def load(directory: Path, dtype: torch.dtype = torch.float32, backend: str | None = "dense"):
    """Load a model whose products are torch's: what is compared is what was loaded."""
    from transformers import AutoModelForCausalLM

    with use_backend(backend):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@torch.inference_mode()
def logits(model):
    return model(PROMPT, use_cache=False).logits


def cases():
    """Yield (family, tied, tables); plain linears once, where the family has a file."""
    for family in (*ADAPTERS, *WITHOUT_A_FILE):
        yield pytest.param((family, True, True), id=f"{family}-tied-tables")
        yield pytest.param((family, False, True), id=f"{family}-untied-tables")
    for family in ADAPTERS:
        yield pytest.param((family, False, False), id=f"{family}-untied-linears-only")


@pytest.fixture(scope="module", params=list(cases()))
def case(request, tiny, tmp_path_factory):
    """Quantize, reload, and keep the original beside it."""
    family, tied, tables = request.param
    sections: dict[str, Any] = {}
    if tables:
        sections = {"embedding": TABLE} if tied else {"embedding": TABLE, "head": TABLE}
    directory = tiny(family, tied=tied)
    out_dir = tmp_path_factory.mktemp("out") / family
    pipeline.quantize(Location(directory), out_dir, recipe(num_bits=8, **sections))
    original = load(directory)
    return SimpleNamespace(
        original=original,
        expected=logits(original),
        reloaded=load(out_dir),
        out_dir=out_dir,
        tables=tables,
        tied=tied,
        reader=CheckpointReader(out_dir),
    )


def quantized_modules(model):
    return {n: part for n, part in model.named_modules() if isinstance(part, QuantizedWeight)}


def plain_name(case, module_name):
    """Return the checkpoint's name of a module; some versions of transformers rename heads."""
    names = case.reader.manifest.layers
    if module_name in names:
        return module_name
    (head,) = [name for name in names if name.startswith(("lm_head", "embed_out"))]
    return head


def test_reloaded_layers_are_the_stored_weights_bit_for_bit(case):
    modules = quantized_modules(case.reloaded)
    stored = case.reader.manifest.layers
    own = [name for name, entry in stored.items() if entry.shared_with is None]
    assert len(modules) == len(own)
    for module_name, module in modules.items():
        expected = case.reader.load(plain_name(case, module_name))
        assert torch.equal(dequantized(module.tensor()), dequantized(expected))


def test_logits_equal_those_of_the_original_with_dequantized_weights(case):
    modules = dict(case.original.named_modules())
    with torch.no_grad():
        for name in quantized_modules(case.reloaded):
            weight = dequantized(case.reader.load(plain_name(case, name)))
            target = modules[name].weight
            target.copy_(weight.T if type(modules[name]).__name__ == "Conv1D" else weight)
    torch.testing.assert_close(logits(case.reloaded), logits(case.original), rtol=1e-4, atol=1e-5)


def test_the_backend_chosen_for_a_cpu_says_nearly_the_same(case):
    said, expected = logits(load(case.out_dir, backend=None)), logits(case.reloaded)
    assert float((said - expected).norm()) <= 1e-3 * float(expected.norm())


def test_logits_are_close_to_those_of_the_original(case):
    error = (logits(case.reloaded) - case.expected).norm() / case.expected.norm()
    assert 0 < float(error) < 0.05


def test_every_linear_of_the_blocks_is_quantized_and_the_tables_if_asked(case):
    kinds = [type(module) for module in case.reloaded.modules()]
    assert kinds.count(QuantizedEmbedding) == int(case.tables)
    assert kinds.count(TiedHead) == int(case.tables and case.tied)
    blocks = next(part for part in case.reloaded.modules() if isinstance(part, torch.nn.ModuleList))
    assert len(blocks) == 2
    for part in blocks.modules():
        assert not isinstance(part, torch.nn.Linear)
        assert type(part).__name__ != "Conv1D"
    head = case.reloaded.get_output_embeddings()
    expected = TiedHead if case.tied else QuantizedLinear
    assert isinstance(head, expected if case.tables else torch.nn.Linear)


def test_generation_works_with_a_cache(case):
    with torch.inference_mode():
        tokens = case.reloaded.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=4, do_sample=False
        )
    assert tokens.shape[1] <= PROMPT.shape[1] + 4
    assert torch.equal(tokens[:, : PROMPT.shape[1]], PROMPT)
    # Greedy: each new token is the most likely one after all before it, computed without a cache.
    with torch.inference_mode():
        whole = case.reloaded(tokens[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(whole[:, PROMPT.shape[1] - 1 :], tokens[:, PROMPT.shape[1] :])


def test_half_precision_runs_and_survives_being_saved_again(case, tmp_path):
    dtype = torch.bfloat16 if case.tied else torch.float16
    model = load(case.out_dir, dtype)
    expected = logits(case.reloaded)
    assert float((logits(model).float() - expected).norm() / expected.norm()) < 0.1
    for module in quantized_modules(model).values():
        for part, spec in module.entry.layout().items():
            assert str(module.get_buffer(part).dtype) == f"torch.{spec.dtype}"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, dtype)), logits(model))


def with_linears(name: str) -> bool:
    return not load_family(name).conv1d


@pytest.mark.parametrize("name", [*filter(with_linears, ADAPTERS)])
def test_adapter_agrees_with_what_the_modules_say(name):
    found = adapter_of(families.build(name), name)
    adapter = load_family(name)
    assert (adapter.blocks, adapter.embedding) == (found.blocks, found.embedding)
    assert adapter.base_prefix == found.base_prefix
    assert sorted(sum(adapter.linears, ())) == sorted(sum(found.linears, ()))
