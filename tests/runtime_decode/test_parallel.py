"""Two processes that share a model say what one says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool.base import CausalModel
from qtool.checkpoint.manifest import LayerEntry
from qtool.errors import BackendError
from qtool.integrations.transformers.generate import accelerate, use_runner
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.shared_model import load_shared
from qtool.runtime.backends._choose import use_backend
from qtool.runtime.backends.dense import BACKEND
from qtool.runtime.decode.read_model import weights_of
from qtool.runtime.decode.runner import DecodeRunner
from qtool.runtime.decode.weights import RankPart
from qtool.runtime.modules import QuantizedLinear
from qtool.runtime.spread import spread_model
from qtool.scheme import Shape2D, WeightScheme
from qtool.serving.decoders import ForwardDecoder, PromptPart, SlotDecoder
from qtool.serving.shared_decoder import LeadingDecoder, follow
from tests import families
from tests.contract.test_codecs import random_tensor
from tests.runtime_decode.models import build, prompt
from tests.runtime_decode.ranks import TensorParallel, on_ranks
from tests.runtime_decode.test_runner import stepwise

KINDS = ("llama", "llama-tied", "llama-all-heads", "qwen2-bias", "qwen3-norms")
BLOCKS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def quantized(kind: str = "llama", group_size: int | None = 16, **changes) -> CausalModel:
    """Return a model of random binary-coded linears, multiplied by torch."""
    model = build(kind)
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in BLOCKS:
            shape = Shape2D(*module.weight.shape)
            scheme = WeightScheme(**{"num_bits": 3, "group_size": group_size, **changes})
            tensor = random_tensor("binary_coding", scheme, shape, len(name))
            entry = LayerEntry(format="binary_coding", scheme=scheme, shape=shape, method="bcq")
            with use_backend("dense"):
                new = QuantizedLinear(entry, module.bias)
            small = {n: p * 0.1 if p.is_floating_point() else p for n, p in tensor.parts.items()}
            new.load_state_dict(small, strict=False)
            new.bias = module.bias
            setattr(model.get_submodule(parent), own, new)
    return model.eval()


def says(group: TensorParallel | None, model: CausalModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return logits by the runner and by transformers' forward, greedy tokens, and counts."""
    spread_model(model, group)
    weights = weights_of(model)
    runner = DecodeRunner(weights, BACKEND.decode_ops(weights), max_length=64, batch=len(ids))
    logits = stepwise(runner, ids, 10)
    greedy = runner.greedy(runner.prefill(ids).argmax(-1), 20)
    with torch.no_grad():
        whole = model(ids).logits
    shape = weights.shape
    return [logits, whole, greedy, torch.tensor([shape.num_heads, shape.num_key_value_heads])]


def check(model: CausalModel, heads: list[list[int]], batch: int = 2) -> None:
    ids = prompt(batch, 14)
    found = on_ranks(says, model, ids)
    logits, whole, greedy, _ = says(None, model, ids)
    for rank, mine in enumerate(found):
        torch.testing.assert_close(mine[0], logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(mine[1], whole, rtol=0, atol=1e-5)
        assert torch.equal(mine[2], greedy)
        assert torch.equal(mine[0], found[0][0])
        assert mine[3].tolist() == heads[rank]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_say_what_one_says(kind):
    kv = 2 if kind == "llama-all-heads" else 1
    check(build(kind), [[2, kv], [2, kv]])


@pytest.mark.parametrize("changes", [{}, {"group_size": None}, {"group_size": 32}], ids=str)
def test_quantized_weights_are_cut_at_their_groups(changes):
    check(quantized(**changes), [[2, 1], [2, 1]])


def test_heads_that_do_not_divide_are_spread_unevenly():

    check(
        families.build(
            "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3
        ).float(),
        [[4, 2], [2, 1]],
        batch=1,
    )


def parts(group: TensorParallel, model: CausalModel) -> list[object]:
    spread_model(model, group, dtype=torch.bfloat16)
    layer = weights_of(model).layers[0]
    assert isinstance(layer.output, RankPart)
    assert isinstance(layer.down, RankPart)
    floats = {parameter.dtype for parameter in model.parameters()}
    buffers = {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
    return [layer.output.is_even, layer.down.is_even, floats, buffers]


def test_ranks_know_whether_their_parts_are_even_and_cast_them_but_not_positions():
    only = ({torch.bfloat16}, {torch.float32})
    uneven = families.build(
        "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3
    ).float()
    for model, even in ((build("llama"), True), (uneven, False)):
        for found in on_ranks(parts, model):
            assert found == [even, True, *only]


def loaded_parts(group: TensorParallel, place: Path) -> list[object]:
    loaded = load_shared(Location(place), group, lambda _event: None)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = loaded.model(ids).logits
    weight = loaded.model.model.layers[0].mlp.down_proj.inner.weight
    return [loaded.dtype, weight.dtype, tuple(weight.shape), logits]


def test_ranks_load_what_is_stored_and_cast_their_own_part(llama, tmp_path):
    place = Path(shutil.copytree(llama, tmp_path / "half"))
    whole = load_model(Location(llama), device="cpu", dtype=torch.float16).model
    whole.save_pretrained(place)
    with torch.no_grad():
        logits = whole.float()(torch.arange(3, 15)[None]).logits
    hidden, inner = whole.model.layers[0].mlp.down_proj.weight.shape
    for dtype, stored, shape, found in on_ranks(loaded_parts, place):
        assert (dtype, stored, shape) == (torch.float32, torch.float32, (hidden, inner // 2))
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def refusal(group: TensorParallel, model: CausalModel) -> str:
    with pytest.raises(BackendError) as caught:
        spread_model(model, group)
    return str(caught.value)


def test_too_few_heads_are_refused():
    for text in on_ranks(refusal, build("llama-one-kv")):
        assert text.startswith("Layer 0 has 1 key-value heads: too few for 2 ranks.")


def test_groups_too_wide_are_refused():
    for text in on_ranks(refusal, quantized(group_size=56, kind="llama-all-heads")):
        assert "key-value heads, which groups of weights keep together by 7" in text


STUCK = """
import sys, torch
from qtool.runtime.tensor_parallel import join_ranks
rank, store = int(sys.argv[1]), sys.argv[2]
with join_ranks(rank=rank, world_size=2, device=torch.device("cpu"), init_method=store) as group:
    print("joined", flush=True)
    if rank == 1:
        sys.stdin.read()
    while True:
        group.all_reduce(torch.ones(4))
"""


def test_a_rank_that_is_killed_ends_the_other_with_a_sentence(tmp_path):
    code, store = STUCK, f"file://{tmp_path}/store"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(n), store], text=True, **pipes)  # type: ignore[call-overload]
        for n in range(2)
    ]
    try:
        assert all(rank.stdout.readline() == "joined\n" for rank in ranks)
        ranks[1].kill()
        status, told = ranks[0].wait(30), ranks[0].stderr.read()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert status == 1
    assert told.splitlines()[-1].startswith("Error: rank 1 of 2 has ended, so rank 0 can't go on")


def served(group: TensorParallel | None, model: CausalModel) -> list[torch.Tensor]:
    """Return logits of two sequences, of which the first ends first; of rank 0."""
    decoder: SlotDecoder = ForwardDecoder(spread_model(model, group), max_length=32, slots=2)
    if group is not None and not group.leads:
        follow(decoder, group)
        return []
    leading = decoder if group is None else LeadingDecoder(decoder, group)
    said = [leading.read([PromptPart(0, 0, [5, 6, 7]), PromptPart(1, 0, [8, 9])])]
    said.append(leading.step(said[-1].argmax(-1))[0])
    leading.remove(0, 1, 3)
    said.append(leading.step(said[-1].argmax(-1)[1:])[0])
    if isinstance(leading, LeadingDecoder):
        leading.end()
    return said


def test_other_ranks_follow_the_one_that_serves():
    found, followed = on_ranks(served, build("llama"))
    assert followed == []
    for mine, expected in zip(found, served(None, build("llama")), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def draws(group: TensorParallel, model: CausalModel) -> torch.Tensor:
    torch.manual_seed(group.rank)
    spread_model(accelerate(model), group)
    return model.generate(prompt(1, 5), max_new_tokens=12, do_sample=True, pad_token_id=0)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_ranks_of_other_seeds_draw_the_same_tokens(mode):
    with use_runner(mode):
        first, second = on_ranks(draws, build("llama"))
    assert torch.equal(first, second)
