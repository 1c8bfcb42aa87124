"""A model's own forward goes on as `generate` does, whatever it keeps."""

import pytest
import torch

from qtool.serving.decoders import ForwardDecoder, PromptPart
from tests import tiny

pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = torch.arange(3, 12)[None]
TOKENS = 6


@pytest.mark.parametrize("family", ["llama", "mamba", "mamba2", "openai-gpt", "bert", "xlstm"])
def test_a_sequence_goes_on_as_transformers_has_it(family):
    torch.manual_seed(0)
    model = tiny.build(family).float().eval()
    told = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **told)
    decoder = ForwardDecoder(model, max_length=64, slots=1)
    for _ in range(2):  # the second time nothing is left of the first
        token = decoder.read([PromptPart(0, 0, PROMPT[0].tolist())]).argmax(-1)
        said = [int(token)]
        while len(said) < TOKENS:
            token = decoder.step(token)[1]
            said.append(int(token))
        assert said == expected[0, PROMPT.shape[1] :].tolist()
