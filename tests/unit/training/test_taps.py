"""Blocks that are tapped: nothing changes until the original intervenes, and then as it is told."""

import copy

import pytest
import torch

from qtool.errors import ModelError
from qtool.modeling.encoders import encoder_adapter
from qtool.modeling.families import load_family
from qtool.training.lessons import LessonBatch
from qtool.training.recipes.teacher_intervention import (
    MODES,
    InterventionOptions,
    mode_at,
)
from qtool.training.taps import Signal, errors_of, intervene, relative_error, tap_blocks
from tests import families

TOKENS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
LINEARS = {"bert": ("attention.self.query", "attention.self.value", "intermediate.dense")}
OF_DECODERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def build(family: str):
    """Return a tiny model with what its parts are called, and what it is called with."""
    if family != "bert":
        return families.build(family).float(), load_family(family), {"input_ids": TOKENS}
    from transformers import AutoModelForSequenceClassification

    config = families.configuration("bert", tied=False)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    named = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    return model, encoder_adapter(named), {"input_ids": TOKENS, "attention_mask": mask}


@pytest.fixture(params=["llama", "gpt2", "opt", "qwen3", "bert"])
def pair(request):
    """Return two models that differ, both tapped, with the taps and the inputs."""
    original, places, inputs = build(request.param)
    plain = copy.deepcopy(original)
    student = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(2)
    for value in student.get_submodule(places.blocks).parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    taps, sources = tap_blocks(student, places), tap_blocks(original, places)
    for tap, source in zip(taps, sources, strict=True):
        tap.source = source
    return request.param, plain, original, student, taps, sources, inputs


def test_a_tapped_model_says_what_it_said(pair):
    _, plain, original, _, _, sources, inputs = pair
    with torch.no_grad():
        torch.testing.assert_close(
            original(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5
        )
    assert {"scores", "map", "context", "attention", "mlp", "block"} == set(sources[0].seen)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_every_mode_leaves_a_copy_of_the_original_as_it_is(pair, mode):
    _, _, original, student, taps, _, inputs = pair
    student.load_state_dict(original.state_dict())
    with torch.no_grad():
        wanted = original(**inputs).logits
        intervene(taps, *MODES[mode])
        torch.testing.assert_close(student(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def gradients(pair, mode):
    """Return the gradient that a loss of the logits has by a few linears of the first block."""
    family, _, original, student, taps, _, inputs = pair
    with torch.no_grad():
        original(**inputs)
    intervene(taps, *MODES[mode])
    student.zero_grad()
    student(**inputs).logits.square().sum().backward()
    _, places, _ = build(family)
    block = student.get_submodule(places.blocks)[0]
    found = []
    for name in LINEARS.get(family, OF_DECODERS):
        gradient = block.get_submodule(name).weight.grad
        found.append(0.0 if gradient is None else float(gradient.abs().max()))
    return found


@pytest.mark.parametrize("pair", ["llama", "bert"], indirect=True)
@pytest.mark.parametrize(
    ("mode", "learns"),
    [
        ("attention-output", (False, False, True)),
        ("context", (False, False, True)),
        ("map", (False, True, True)),
        ("both", (False, False, False)),
    ],
)
def test_what_is_the_originals_passes_no_gradient(pair, mode, learns):
    assert tuple(gradient > 0 for gradient in gradients(pair, mode)) == learns
    assert all(value.grad is None for value in pair[2].parameters())


@pytest.mark.parametrize("pair", ["llama", "bert"], indirect=True)
def test_with_both_outputs_each_block_gets_what_the_originals_gets(pair):
    _, _, original, student, taps, sources, inputs = pair
    intervene(taps, *MODES["attention-output"])
    with torch.no_grad():
        original(**inputs)
        student(**inputs)
        assert not torch.allclose(taps[0].seen["block"], sources[0].seen["block"], atol=1e-3)
    if pair[0] == "llama":  # norms after the sums, as in BERT, are the student's own
        intervene(taps, *MODES["both"])
        with torch.no_grad():
            student(**inputs)
        for tap, source in zip(taps, sources, strict=True):
            torch.testing.assert_close(tap.seen["block"], source.seen["block"])


@pytest.mark.parametrize("steps", [1, 5, 6, 60, 120])
def test_the_gradual_schedule_switches_twice(steps):
    options = InterventionOptions()
    modes = [mode_at(options, step, steps) for step in range(steps)]
    first, second = -(-steps // 6), -(-steps // 3)
    assert modes[:first] == ["attention-output"] * min(first, steps)
    assert modes[first:second] == ["context"] * (second - first)
    assert modes[second:] == ["map"] * (steps - second)
    assert mode_at(InterventionOptions(mode="both"), 0, steps) == "both"


def test_errors_add_up_over_samples_and_count_no_filler(pair):
    _, _, original, student, taps, sources, inputs = pair
    seen = torch.ones(TOKENS.shape, dtype=torch.bool)
    seen[1, 6:] = False
    weights: dict[Signal, float] = {"block": 1.0, "scores": 0.5, "attention": 2.0}

    @torch.no_grad()
    def errors(some: slice) -> torch.Tensor:
        for model in (original, student):
            model(**{name: value[some] for name, value in inputs.items()})
        return errors_of(taps, sources, weights, seen[some])

    whole = errors(slice(None))
    parts = errors(slice(0, 1)) + errors(slice(1, 3))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert float(whole) > 0


def test_relative_error_by_hand():
    found, wanted = torch.tensor([[1.0, 5.0], [2.0, 9.0]]), torch.tensor([[2.0, 7.0], [1.0, 3.0]])
    counts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(relative_error(found, wanted, counts)) == pytest.approx(1 / 4 + 1)


def test_a_family_whose_sums_nobody_knows_is_refused():
    model, places, _ = build("llama")
    from dataclasses import replace

    with pytest.raises(ModelError, match=r"can't be followed.*losses but `logits` to 0"):
        tap_blocks(model, replace(places, residual=None))


def test_a_lesson_asks_what_has_labels():
    lesson = LessonBatch({"input_ids": TOKENS}, torch.where(TOKENS < 50, -100, TOKENS), TOKENS > 0)
    logits, labels = lesson.asked(torch.zeros(3, 9, 96))
    assert len(logits) == len(labels) == int((TOKENS >= 50).sum())
    assert lesson.part(slice(1, 3)).num_samples == 2
    assert not lesson.classifies
