"""On a card: prompts read in parts, attention over the cache, and the kernel that draws tokens."""

import pytest
import torch

from qtool.core.nucleus import sample_nucleus
from qtool.runtime.decode.prompts import PromptSpan, attend_to_cache, packed
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.slots import SlotRunner
from tests.runtime_decode.models import build, prompt
from tests.runtime_decode.test_gpu import TOLERANCE, kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (4, 1, 256)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_prompts_attend_to_the_cache(heads, kv_heads, dim, dtype):
    generator = torch.Generator("cuda").manual_seed(1)

    def drawn(*size):
        return torch.randn(size, device="cuda", generator=generator).to(dtype)

    keys, values = drawn(5, kv_heads, 300, dim), drawn(5, kv_heads, 300, dim)
    for spans in (
        [PromptSpan(4, 0, 1)],
        [PromptSpan(0, 0, 300), PromptSpan(3, 10, 1), PromptSpan(1, 250, 50)],
        [PromptSpan(2, 100, 7), PromptSpan(4, 299, 1), PromptSpan(0, 0, 65)],
    ):
        prompts = packed(spans, keys[None])
        query = drawn(sum(span.count for span in spans), heads, dim)
        got = attend_to_cache(query, keys, values, prompts, dim**-0.5)
        wide = (each.cpu().double() for each in (query, keys, values))
        expected = attend_to_cache(next(wide), next(wide), next(wide), prompts, dim**-0.5).cuda()
        error = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=error, atol=error)


@torch.no_grad()
def test_a_prompt_in_parts_on_a_card():
    weights, ids = weights_of(build("llama", torch.float16).cuda()), prompt(2, 60).cuda()
    slots = SlotRunner(weights, kernels(), max_length=80, slots=5)
    one = DecodeRunner(weights, kernels(), max_length=80)
    slots.read([PromptSpan(0, 0, 20)], ids[0, :20])
    logits = torch.empty(0)
    for begin, end in ((0, 1), (1, 33), (33, 60)):
        logits = slots.read([PromptSpan(2, begin, end - begin)], ids[1, begin:end])
        slots.step(ids[0, 20][None])
    expected = one.prefill(ids[1:])
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_tokens_are_drawn_as_their_definition_says(dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(1 + seed % 16, 128256, generator=generator) * 3).to(dtype).cuda()
        options = torch.rand(len(logits), 4, generator=generator, dtype=torch.float64)
        options[:, 0] += 0.05
        options[:, 1] *= 1.2
        options[:, 3] = 0
        best, moved = logits.argmax(-1), options.cuda()
        expected = sample_nucleus(logits, best, moved[:, :1], moved[:, 1:2], moved[:, 2:3])
        got = kernels().draw(logits, best, options)
        assert got is not None
        assert (got != expected).sum() <= 1  # exponentials may differ in their last bit
