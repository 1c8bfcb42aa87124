"""Students follow their originals, keep what doesn't learn, and go back where they were best."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from qtool.base import CausalModel, QuantizedTensor
from qtool.core.packing import planes_to_codes
from qtool.scheme import WeightScheme
from qtool.training.blocks import Lesson, tune_block
from qtool.training.descent import Learning, descend
from qtool.training.divergence import divergence
from qtool.training.end_to_end import Course, Pair, best_rate, tune_end_to_end
from qtool.training.refinement import refine_codes
from qtool.training.schedule import Point, Schedule
from qtool.training.student import (
    LearnedLinear,
    free_vectors,
    install_layers,
    learned_layers,
    make_student,
    recompute_blocks,
)
from tests import families
from tests.helpers import dequantized, normal
from tests.unit.training.solved import SOLVERS, solved

SCHEME = WeightScheme(num_bits=2, group_size=24)
TOKENS = torch.randint(3, 96, (32, 24), generator=torch.Generator().manual_seed(0))
BATCHES = list(TOKENS[4:].split(4))
COURSE = Course(BATCHES, [TOKENS[:4]])


def original() -> CausalModel:
    return families.build("llama").float().eval()


def quantized(model: CausalModel, name: str) -> dict[str, QuantizedTensor]:
    return {
        path: solved(name, module.weight.detach(), SCHEME)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith("model.layers.")
    }


def schedule(**changes: float) -> Schedule:
    values: dict[str, float] = {"steps": 30, "learning_rate": 1e-2, "warmup": 3, "check_every": 10}
    return Schedule(**{**values, **changes})  # type: ignore[arg-type]


@functools.cache
def tuned(
    name: str, **changes: float
) -> tuple[CausalModel, CausalModel, Mapping[str, QuantizedTensor], list[Point]]:
    """Tune a student; return its original, it, what it began as, and its curve: read only."""
    model = original()
    layers = quantized(model, name)
    student = make_student(model, layers, moves_codes=changes.get("code_rate", 0) > 0)
    norms = [path for path, value in model.named_parameters() if value.dim() == 1]
    pair = Pair(student, model, list(free_vectors(student, norms).values()))
    points = tune_end_to_end(pair, COURSE, schedule(**changes), lambda _: None)
    return model, student, layers, points


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("code_rate", [0.0, 2e-2])
def test_a_student_comes_closer_to_its_original(name, code_rate):
    _, _, _, points = tuned(name, code_rate=code_rate)
    assert min(point.held_out for point in points) < 0.9 * points[0].held_out
    assert [point.step for point in points] == [0, 10, 20, 30]


@pytest.mark.parametrize("name", SOLVERS)
def test_planes_stay_to_the_bit_and_the_original_whole(name):
    model, student, layers, _ = tuned(name, code_rate=0.0)
    planes = "codes" if name == "affine" else "bit_planes"
    for path, layer in learned_layers(student):
        assert torch.equal(layer.stored().parts[planes], layers[path].parts[planes])
    for path, value in original().named_parameters():
        assert torch.equal(model.get_parameter(path), value), path


@pytest.mark.parametrize("name", SOLVERS)
def test_the_checkpoint_is_the_student(name):
    _, student, _, _ = tuned(name, code_rate=2e-2)
    for _, layer in learned_layers(student):
        expected = layer.weight().detach()
        torch.testing.assert_close(dequantized(layer.stored()), expected, rtol=4e-3, atol=4e-4)


def test_codes_move_only_where_they_may():
    _, student, layers, _ = tuned("binary_coding", code_rate=5e-2)
    changed = [
        not torch.equal(layer.stored().parts["bit_planes"], layers[path].parts["bit_planes"])
        for path, layer in learned_layers(student)
    ]
    assert any(changed)


def test_a_rate_that_diverges_leaves_what_was_there():
    _, student, layers, points = tuned("binary_coding", learning_rate=50.0)
    assert points[-1].held_out > points[0].held_out
    for path, layer in learned_layers(student):
        for part, values in layer.stored().parts.items():
            assert torch.equal(values, layers[path].parts[part])


def test_a_loss_that_is_not_finite_ends_it():
    weight = torch.nn.Parameter(torch.ones(4))
    losses = iter([1.0, 1.0, float("nan"), 1.0, 1.0])
    what = Learning((), [weight], lambda _: None, lambda: weight.sum() * next(losses), lambda: 1.0)
    points = descend(what, schedule(steps=5, check_every=1), lambda _: None)
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert torch.equal(weight, torch.ones(4))


def test_the_best_state_is_kept_not_the_last():
    weight = torch.nn.Parameter(torch.zeros(1))
    seen = iter([3.0, 1.0, 2.0])
    states = []

    def held_out() -> float:
        states.append(weight.item())
        return next(seen)

    what = Learning((), [weight], lambda _: None, lambda: -weight.sum(), held_out)
    descend(what, schedule(steps=2, check_every=1), lambda _: None)
    assert weight.item() == states[1] != states[2]


def tuned_block(
    alike: Sequence[int] = (), device: str = "cpu", *, waits: bool = False
) -> tuple[list[Point], int]:
    """Tune a small block; return its curve, and how often its code ran."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.ReLU(), torch.nn.Linear(48, 24))
    block.to(device)
    inputs = [normal(2, 16, 24, seed=seed) for seed in range(6)]
    with torch.no_grad():
        targets = [block(x.to(device)) for x in inputs]
    weights = {key: block.get_parameter(f"{key}.weight").detach() for key in "02"}
    layers = {key: solved("binary_coding", weight.cpu(), SCHEME) for key, weight in weights.items()}
    on_device = {
        key: replace(layer, parts={name: part.to(device) for name, part in layer.parts.items()})
        for key, layer in layers.items()
    }
    install_layers(block, on_device, moves_codes=True)
    learned = [layer for _, layer in learned_layers(block)]
    calls = 0

    def forward(hidden: torch.Tensor, batch: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert batch == 5 or not alike or batch == alike[0]
        output: torch.Tensor = block(hidden.to(device))
        return output * (1.0 if not waits or output.sum().isfinite() else 0.0)

    lesson = Lesson(forward, inputs, targets, 5, alike)
    return tune_block(learned, lesson, schedule(code_rate=1e-2), lambda _: None), calls


def test_a_block_learns_the_outputs_of_the_original():
    points, _ = tuned_block()
    assert min(point.held_out for point in points) < 0.9 * points[0].held_out


def test_batches_that_are_alike_are_learned_from_as_they_are():
    assert tuned_block(range(5)) == tuned_block()
    assert tuned_block([0, 2]) != tuned_block()


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [False, True])
def test_a_step_that_is_recorded_does_what_it_does(waits):
    """One that waits for the card can't be recorded, and is taken as it is."""
    expected, as_they_are = tuned_block(device="cuda")
    points, calls = tuned_block(range(5), "cuda", waits=waits)
    assert (calls >= as_they_are) is waits
    for point, wanted in zip(points, expected, strict=True):
        assert point.held_out == pytest.approx(wanted.held_out, rel=1e-3)


def test_one_token_of_huge_output_does_not_decide_alone():
    """Attention sinks: without weights the loss would be theirs."""
    block = torch.nn.Linear(24, 24, bias=False)
    x = normal(1, 64, 24)
    x[0, 0] *= 1000
    with torch.no_grad():
        target = block(x)
    install = {"0": solved("binary_coding", block.weight.detach(), SCHEME)}
    module = torch.nn.Sequential(block)
    install_layers(module, install, moves_codes=False)
    (layer,) = [layer for _, layer in learned_layers(module)]
    losses: list[float] = []

    def report(point: Point) -> None:
        losses.append(point.held_out)

    lesson = Lesson(lambda hidden, _: module(hidden), [x, x], [target, target], 1)
    tune_block([layer], lesson, schedule(steps=1), report)
    error = (module(x).detach() - target).square().sum(-1) / target.square().sum(-1)
    assert losses[0] < 10 * float(error.median())


def test_divergence_is_that_of_its_definition_with_its_gradient():
    logits = normal(2100, 7).double().requires_grad_()
    wanted = normal(2100, 7, seed=1).double()
    value = divergence(logits, wanted)
    target, found = wanted.log_softmax(-1), logits.log_softmax(-1)
    expected = (target.exp() * (target - found)).sum(-1).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(value, logits)
    (right,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-8)


def test_rates_warm_up_and_fall_to_their_floor():
    plan = Schedule(steps=100, learning_rate=1.0, warmup=10, floor=0.1)
    factors = [plan.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_refinement_moves_few_codes_and_only_if_it_helps(name):
    _, student, layers, points = tuned(name, code_share=0.01, learning_rate=1e-6)
    losses = [point.held_out for point in points]
    assert all(after < 1.001 * before for before, after in itertools.pairwise(losses))
    moved = total = 0
    for path, layer in learned_layers(student):
        begun = codes_of(layers[path])
        now = codes_of(layer.stored())
        most = max(1, int(0.01 * layer.codes.numel()))
        assert int((now != begun).sum()) <= 3 * most  # three looks
        moved, total = moved + int((now != begun).sum()), total + now.numel()
    assert moved > 0
    assert losses[-1] < losses[0]


def codes_of(tensor: QuantizedTensor) -> torch.Tensor:
    planes = tensor.parts["codes" if tensor.format == "affine" else "bit_planes"]
    return planes_to_codes(planes, tensor.shape.in_features)


def squares(
    layer: LearnedLinear, x: torch.Tensor, targets: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return squared errors of batches, and what has their curvature as its gradient's variance."""
    pairs = []
    for seed, (each, target) in enumerate(zip(x, targets, strict=True)):
        output = layer(each)
        noise = 2**0.5 * normal(*output.shape, seed=seed)
        pairs.append(((output - target).square().sum(-1).mean(), (noise * output).sum(-1).mean()))
    return pairs


def linear() -> LearnedLinear:
    return LearnedLinear(solved("binary_coding", normal(4, 24), SCHEME), None, moves_codes=False)


def test_moves_that_do_not_help_are_taken_back():
    layer, x = linear(), normal(2, 16, 24)
    before = layer.codes.clone()
    seen = []

    def held_out() -> float:
        seen.append(int((layer.codes != before).sum()))
        return 2.0

    zeros = torch.zeros(2, 16, 4)
    found = refine_codes(
        [layer],
        lambda: squares(layer, x, list(zeros)),
        held_out,
        share=0.1,
        num_tokens=16,
        before=1.0,
    )
    assert found == 1.0
    assert torch.equal(layer.codes, before)
    assert 0 < seen[-1] <= seen[0] <= 0.1 * layer.codes.numel()
    assert layer.watched is None


def test_the_codes_that_promise_most_move_first():
    layer, x = linear(), normal(20, 64, 24)
    before, target = layer.codes.clone(), layer.weight().detach().clone()
    target[2, 5] += 3.0 * (1 if target[2, 5] < 0 else -1)
    targets = [each @ target.T for each in x]

    def held_out() -> float:
        return sum(loss.item() for loss, _ in squares(layer, x, targets))

    share, old = 1 / layer.codes.numel(), held_out()
    losses = functools.partial(squares, layer, x, targets)
    found = refine_codes([layer], losses, held_out, share=share, num_tokens=64, before=old)
    changed = layer.weight() != layer_of(layer, before)
    assert changed.nonzero().tolist() == [[2, 5]]
    assert found < old


def test_a_weight_of_great_slope_and_greater_curvature_stays():
    """As those that carry massive activations: one step is far past their minimum."""
    layer, x = linear(), normal(20, 32, 24)
    begun = layer.weight().detach()
    x[..., 7] *= 1000
    targets = [each @ begun.T + 0.3 * normal(32, 4, seed=n) for n, each in enumerate(x)]

    def held_out() -> float:
        return sum(loss.item() for loss, _ in squares(layer, x, targets))

    losses = functools.partial(squares, layer, x, targets)
    refine_codes([layer], losses, held_out, share=0.5, num_tokens=32, before=1e9)
    assert torch.equal(layer.weight()[:, 7], begun[:, 7])


def layer_of(layer: LearnedLinear, codes: torch.Tensor) -> torch.Tensor:
    now = layer.codes.clone()
    layer.codes.copy_(codes)
    weight = layer.weight().detach()
    layer.codes.copy_(now)
    return weight


def test_rates_are_tried_from_where_a_student_is_and_leave_it_there():
    model = original()
    layers = quantized(model, "binary_coding")
    student = make_student(model, layers, moves_codes=False)
    pair = Pair(student, model)
    found = best_rate(pair, COURSE, schedule(steps=10, check_every=10), [1e-5, 1e-2, 50.0])
    assert next(iter(found)) == 1e-2
    assert set(found) == {1e-5, 1e-2, 50.0}
    for path, layer in learned_layers(student):
        assert all(bool((move == 0).all()) for move in layer.moves.values()), path


def test_recomputed_blocks_have_the_same_gradients():
    model = original()
    layers = quantized(model, "coded_scales")
    losses, grads = [], []
    for recomputed in (False, True):
        student = make_student(model, layers, moves_codes=True)
        if recomputed:
            recompute_blocks(student, "model.layers")
        loss = Pair(student, model).divergence(BATCHES[0])
        loss.backward()
        losses.append(loss.item())
        grads.append(
            [move.grad for _, each in learned_layers(student) for move in each.parameters()]
        )
    assert losses[0] == pytest.approx(losses[1])
    for first, second in zip(*grads, strict=True):
        assert first is not None and second is not None
        torch.testing.assert_close(first, second)
    assert "forward" not in vars(model.model.layers[0])
