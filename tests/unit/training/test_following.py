"""Following: what is recorded for a card is the same loss, and one lesson becomes another."""

import copy
from dataclasses import replace

import torch

from qtool.training.divergence import divergence
from qtool.training.following import Following
from qtool.training.lessons import LessonBatch
from tests import families
from tests.helpers import normal

TOKENS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))


def lesson_of(tokens: torch.Tensor, below: int) -> LessonBatch:
    """Return a lesson that asks for no token below a number."""
    return LessonBatch({"input_ids": tokens}, torch.where(tokens < below, -100, tokens), tokens > 0)


def test_a_loss_whose_sizes_depend_on_no_value_is_the_same_one():
    original = families.build("llama").float()
    student = copy.deepcopy(original)
    for number, value in enumerate(student.parameters()):
        value.data += 0.05 * normal(*value.shape, seed=number)
    following = Following(original, student)
    steady = replace(following, captured=True)
    for below in (0, 50):
        lesson = lesson_of(TOKENS, below)
        losses = [each.distance(lesson) for each in (following, steady)]
        torch.testing.assert_close(losses[0], losses[1])
        left, right = (
            torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, student.parameters())])
            for loss in losses
        )
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
        parts = [steady.distance(lesson, slice(at, at + 1)) for at in range(3)]
        torch.testing.assert_close(sum(parts), losses[0])


def test_shares_weigh_tokens():
    logits, wanted = normal(1500, 5).requires_grad_(), normal(1500, 5, seed=1)
    shares = torch.rand(1500, generator=torch.Generator().manual_seed(0))
    found, target = logits.double().log_softmax(-1), wanted.double().log_softmax(-1)
    expected = ((target.exp() * (target - found)).sum(-1) * shares).sum()
    value = divergence(logits, wanted, shares)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(value, logits)
    (right,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-8)


def test_a_lesson_becomes_another_in_place():
    lesson, other = lesson_of(TOKENS.clone(), 0), lesson_of(TOKENS.flip(1), 50)
    places = [value.data_ptr() for value in (lesson.inputs["input_ids"], lesson.labels)]
    lesson.take(other)
    assert torch.equal(lesson.inputs["input_ids"], other.inputs["input_ids"])
    assert torch.equal(lesson.labels, other.labels)
    assert [v.data_ptr() for v in (lesson.inputs["input_ids"], lesson.labels)] == places
