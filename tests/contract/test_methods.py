"""What every method must do: found by file name, so a new one is tested without an edit here."""

from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch

import qtool.methods
from qtool import pipeline, plugins
from qtool.base import Method, QuantizedTensor, Statistic
from qtool.checkpoint.manifest import codec
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.hessian import relative_loss
from qtool.errors import QtoolError, SchemeError
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.scheme import GROUP_DIMS, GroupDim, Shape2D, WeightScheme
from qtool.steps.method_choice import load_method, parse_options
from tests.helpers import dequantized, normal, problem, statistics

METHODS = plugins.names(qtool.methods)
SHAPE = Shape2D(20, 40)
DTYPES = {"int32": torch.int32, "float16": torch.float16}
# Squared error over squared norm for normal weights in groups of at most 40: no method is worse.
BOUND = {1: 1.5, 2: 0.35, 3: 0.08, 4: 0.017, 5: 0.005, 6: 0.0015, 7: 5e-4, 8: 2e-4}
Grouping = tuple[int | None, GroupDim, bool]
BEST_BITS = 4  # the width of tests that are about something else


def schemes(method):
    """Return the schemes to try: every width, and for one of them every kind of grouping."""
    some: tuple[Grouping, ...]
    some = ((32, "in_features", False), (None, "out_features", False), (16, "out_features", True))
    every = tuple(product((1, 7, 16, 40, 128, None), GROUP_DIMS, (False, True)))
    all_of_them = (
        WeightScheme(num_bits=bits, group_size=size, group_dim=dim, symmetric=symmetric)
        for bits in method.num_bits
        for size, dim, symmetric in (every if bits == BEST_BITS else some)
    )
    return [scheme for scheme in all_of_them if takes(method, scheme)]


def takes(method, scheme) -> bool:
    try:
        method.layout(scheme, SHAPE, method.options())
    except SchemeError:
        return False
    return True


def name_of(scheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return f"{scheme.num_bits}bit-{scheme.group_size or 'row'}-{scheme.group_dim}-{kind}"


def variants():
    """Yield (solver, calibrated): what does better with statistics is tested without them too."""
    for name in METHODS:
        method = load_method(name)
        if not method.needs:
            yield name, False
        if method.needs | method.uses:
            yield name, True


def describe(variant) -> str:
    return f"{variant[0]}-calibrated" if variant[1] else variant[0]


CASES = [
    pytest.param(variant, scheme, id=f"{describe(variant)}-{name_of(scheme)}")
    for variant in variants()
    for scheme in schemes(load_method(variant[0]))
]
CALIBRATED = [variant for variant in variants() if variant[1]]


@dataclass(frozen=True)
class Solver:
    """A method and the statistics that it gets."""

    method: Method
    statistics: frozenset[Statistic]

    def problem(self, weight, scheme):
        return problem(weight, scheme, self.statistics)

    def solve(self, weight, scheme):
        return self.method.solve(self.problem(weight, scheme), self.method.options())


def solver_of(variant) -> Solver:
    method = load_method(variant[0])
    return Solver(method, method.needs | method.uses if variant[1] else frozenset())


@pytest.fixture(params=list(variants()), ids=describe)
def solver(request):
    return solver_of(request.param)


@pytest.fixture(params=METHODS)
def method(request):
    return load_method(request.param)


def default_scheme(method, **changes):
    bits = min(BEST_BITS, method.num_bits.stop - 1)
    scheme = WeightScheme(**{"num_bits": bits, "group_size": 32, **changes})
    return scheme if takes(method, scheme) else replace(scheme, symmetric=True)


@pytest.mark.parametrize(("variant", "scheme"), CASES)
def test_parts_and_error_are_those_promised(variant, scheme):
    solver, weight = solver_of(variant), normal(*SHAPE)
    solution = solver.solve(weight, scheme)
    tensor = solution.tensor
    assert (tensor.scheme.plain(), tensor.shape) == (scheme, SHAPE)
    assert solver.method.is_tunable == (codec(tensor.format).trainable is not None)
    parts = {part: (t.dtype, tuple(t.shape)) for part, t in tensor.parts.items()}
    promised = solver.method.layout(scheme, SHAPE, solver.method.options())
    for layout in (promised, codec(tensor.format).layout(tensor.scheme, SHAPE)):
        assert parts == {part: (DTYPES[s.dtype], s.shape) for part, s in layout.items()}
    assert all(part.is_contiguous() for part in tensor.parts.values())
    error = float((dequantized(tensor) - weight).square().sum() / weight.square().sum())
    assert error < BOUND[scheme.num_bits]
    assert solution.metrics["nmse"] == pytest.approx(error, rel=1e-4)


def test_it_repeats_itself_and_leaves_its_inputs_alone(solver):
    weight, scheme = normal(*SHAPE), default_scheme(solver.method)
    given = solver.problem(weight, scheme)
    before = {name: value.clone() for name, value in given.statistics.items()}
    first = solver.method.solve(given, solver.method.options())
    assert torch.equal(weight, normal(*SHAPE))
    for name, value in before.items():
        assert torch.equal(given.statistics[name], value)
    second = solver.solve(weight, scheme)
    assert first.metrics == second.metrics
    for part, value in first.tensor.parts.items():
        assert torch.equal(value, second.tensor.parts[part])


def test_global_random_state_has_no_influence(solver):
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append(solver.solve(normal(*SHAPE), default_scheme(solver.method)).tensor.parts)
    for part, value in results[0].items():
        assert torch.equal(value, results[1][part])


def test_transposed_weight_that_is_not_contiguous_is_solved_alike(solver):
    weight, scheme = normal(*SHAPE), default_scheme(solver.method)
    strided = weight.T.contiguous().T
    assert not strided.is_contiguous()
    expected = solver.solve(weight, scheme).tensor.parts
    for part, value in solver.solve(strided, scheme).tensor.parts.items():
        assert torch.equal(value, expected[part])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_all_zero_weights_and_groups_come_back_exactly(solver, symmetric, group_dim):
    scheme = default_scheme(solver.method, symmetric=symmetric, group_dim=group_dim)
    if takes(solver.method, scheme):
        zeros = torch.zeros(SHAPE)
        assert torch.equal(dequantized(solver.solve(zeros, scheme).tensor), zeros)
        weight = normal(*SHAPE)
        weight[:, :32] = 0
        got = dequantized(solver.solve(weight, scheme).tensor)
        assert bool(torch.isfinite(got).all())
        if group_dim == "in_features" and not solver.statistics:  # no error comes in from others
            assert torch.equal(got[:, :32], weight[:, :32])


@pytest.mark.parametrize("constant", [0.5, -2.0, 2.0**-10])
def test_constant_groups_come_back_but_for_the_rounding_of_scales(solver, constant):
    weight = torch.full(SHAPE, constant)
    got = dequantized(solver.solve(weight, default_scheme(solver.method)).tensor)
    assert float((got - weight).abs().max()) <= 2**-10 * abs(constant)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e-3, 1e4])
def test_extreme_magnitudes_give_finite_parts(solver, magnitude):
    weight = magnitude * normal(*SHAPE)
    got = dequantized(solver.solve(weight, default_scheme(solver.method)).tensor, torch.float64)
    assert bool(torch.isfinite(got).all())
    # Below float16's smallest number a weight may become zero, but never larger than before.
    assert float(got.abs().max()) <= 2 * float(weight.abs().max()) + 2**-24


def test_more_bits_have_less_error(solver):
    weight = normal(*SHAPE)
    supported = [
        scheme
        for bits in solver.method.num_bits
        if takes(solver.method, scheme := default_scheme(solver.method, num_bits=bits))
    ]
    errors = [solver.solve(weight, scheme).metrics["nmse"] for scheme in supported]
    assert len(errors) > 1
    assert errors == sorted(errors, reverse=True)


def test_one_outlier_costs_only_its_own_group(solver):
    weight = normal(*SHAPE)
    scheme = default_scheme(solver.method, group_size=16)
    if solver.statistics:
        pytest.skip("error feedback carries the outlier's error to other groups on purpose")
    plain = dequantized(solver.solve(weight, scheme).tensor)
    weight[3, 20] = 1000.0  # in group 1
    spoiled = dequantized(solver.solve(weight, scheme).tensor)
    changed = (plain != spoiled).nonzero()
    assert set(changed[:, 0].tolist()) == {3}
    assert set((changed[:, 1] // 16).tolist()) == {1}


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (33, 1), (2, 128), (3, 31)])
def test_odd_shapes_are_solved(solver, shape):
    weight = normal(*shape)
    tensor = solver.solve(weight, default_scheme(solver.method)).tensor
    got = dequantized(tensor)
    assert got.shape == shape
    assert float((got - weight).square().sum()) <= 0.05 * float(weight.square().sum())


@pytest.mark.parametrize("variant", CALIBRATED, ids=describe)
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_statistics_lower_the_error_of_the_outputs(variant, num_bits):
    solver, rounding = solver_of(variant), load_method("rtn")
    weight, scheme = normal(*SHAPE), WeightScheme(num_bits=num_bits, group_size=16)
    hessian = statistics(["hessian"], SHAPE.in_features)["hessian"]

    def loss(solution):
        error = dequantized(solution.tensor) - weight
        return float((error @ hessian * error).sum())

    plain = rounding.solve(problem(weight, scheme), rounding.options())
    assert loss(solver.solve(weight, scheme)) < 0.7 * loss(plain)


HESSIANS = {
    "zero": torch.zeros(SHAPE.in_features, SHAPE.in_features),
    "rank one": torch.ones(SHAPE.in_features, SHAPE.in_features),
    "tiny": 1e-30 * torch.eye(SHAPE.in_features),
    "huge": 1e30 * torch.eye(SHAPE.in_features),
    "dead inputs": torch.diag((torch.arange(SHAPE.in_features) % 3 > 0).float()),
}


@pytest.mark.parametrize("variant", CALIBRATED, ids=describe)
@pytest.mark.parametrize("kind", HESSIANS)
@pytest.mark.parametrize("group_dim", GROUP_DIMS)
def test_degenerate_hessian_gives_a_sane_weight(variant, kind, group_dim):
    solver, weight = solver_of(variant), normal(*SHAPE)
    if "hessian" not in solver.statistics:
        pytest.skip("doesn't use the Hessian")
    scheme = default_scheme(solver.method, group_dim=group_dim, group_size=16)
    given = replace(solver.problem(weight, scheme), statistics={"hessian": HESSIANS[kind]})
    got = dequantized(solver.method.solve(given, solver.method.options()).tensor)
    assert bool(torch.isfinite(got).all())
    assert float((got - weight).square().sum()) < 0.5 * float(weight.square().sum())


def test_options_are_frozen_keyword_only_and_have_defaults(method):
    options: Any = method.options
    assert is_dataclass(method.options)
    assert vars(options)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in fields(options))
    for field in fields(options):
        assert field.default is not MISSING or field.default_factory is not MISSING
    assert hash(options()) == hash(options())


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_documented(name):
    import ast
    import importlib
    import inspect

    module = importlib.import_module(f"qtool.methods.{name}")
    options = load_method(name).options
    tree = ast.parse(inspect.getsource(module))
    (body,) = [
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == options.__name__
    ]
    documented = {
        before.target.id
        for before, after in pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(options)}


def test_summary_is_one_sentence_and_bits_are_in_range(method):
    assert method.summary.endswith(".")
    assert "\n" not in method.summary
    assert set(method.num_bits) <= set(range(1, 9))
    assert len(method.num_bits) > 0


@pytest.mark.parametrize("name", METHODS)
def test_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(QtoolError, match=r"No 'no_such_option' in weights\.options") as caught:
        parse_options(name, load_method(name), {"no_such_option": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_option_of_the_wrong_type_is_refused_in_one_line(name):
    method = load_method(name)
    for field in fields(method.options):
        with pytest.raises(QtoolError, match=field.name) as caught:
            parse_options(name, method, {field.name: {"not": "a value"}})
        assert "\n" not in str(caught.value)
        if not isinstance(field.default, bool):  # a plain float would take it for 1
            with pytest.raises(QtoolError, match=field.name):
                parse_options(name, method, {field.name: True})


@pytest.mark.parametrize("variant", CALIBRATED, ids=describe)
def test_permuted_inputs_give_the_permuted_weight(variant):
    """Groups may trade places, and inputs within a group: solvers choose their own order."""
    solver, weight = solver_of(variant), normal(*SHAPE)
    size = 8
    generator = torch.Generator().manual_seed(1)
    groups = torch.randperm(SHAPE.in_features // size, generator=generator)
    inside = torch.randperm(size, generator=generator)
    order = (groups[:, None] * size + inside).flatten()
    scheme = default_scheme(solver.method, num_bits=3, group_size=size)
    given = solver.problem(weight, scheme)
    moved = {"hessian": given.statistics["hessian"][order][:, order]}
    plain = dequantized(solver.method.solve(given, solver.method.options()).tensor)
    other = replace(given, weight=weight[:, order].contiguous(), statistics=moved)
    permuted = dequantized(solver.method.solve(other, solver.method.options()).tensor)
    # The polish visits groups as they are stored, and sums in another order may flip a near-tie:
    # some rows end in another optimum, which is as good.
    rows = (permuted - plain[:, order]).abs().amax(1) <= 1e-3 * weight.abs().max()
    assert float(rows.float().mean()) >= 0.5
    losses = [
        relative_loss(q - p.weight, p.weight, p.statistics["hessian"])
        for q, p in ((plain, given), (permuted, other))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.04)


@pytest.mark.parametrize("name", [name for name in METHODS if not load_method(name).needs])
def test_model_is_quantized_stopped_gone_on_with_and_read(name, llama, tmp_path):
    method, out_dir = load_method(name), tmp_path / "out"
    widths = [bits for bits in (2, BEST_BITS) if bits in method.num_bits]
    scheme = next(s for s in schemes(method) if s.num_bits in widths and s.group_size)
    fields_of_users = {key: value for key, value in scheme.to_json().items() if key != "code"}
    recipe = recipe_from_mapping(
        {"version": 1, "weights": {"method": name, "scheme": fields_of_users}}
    )

    def stop(*_):
        if len(list(tmp_path.glob("*/layers/*"))) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(Location(llama), out_dir, recipe, emit=stop)
    pipeline.quantize(Location(llama), out_dir, recipe, resume=True)
    reader = CheckpointReader(out_dir)
    assert reader.manifest.layers
    for layer, entry in reader.manifest.layers.items():
        loaded = reader.load(layer)
        assert isinstance(loaded, QuantizedTensor)
        assert loaded.scheme == entry.scheme
        assert entry.scheme.plain() == scheme
