"""Row groups with second moments of their own, weighed by gradients, through whole runs."""

from dataclasses import replace

import pytest
import torch

from qtool import pipeline
from qtool.base import Progress
from qtool.checkpoint.reader import CheckpointReader
from qtool.core import hessian
from qtool.modeling.load import load_original, load_tokenizer
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.load import recipe_from_mapping
from qtool.scheme import Shape2D, WeightScheme
from qtool.steps import solve_layer, weigh_tokens
from qtool.steps.draw_calibration import draw_calibration
from qtool.steps.plan import LayerPlan, load_method
from qtool.steps.row_edges import row_edges
from qtool.steps.solve_calibrated import solve_calibrated
from qtool.steps.weigh_tokens import scaled
from qtool.walk.statistics import RowGroups
from tests.helpers import QUICK_BCQ, file_hashes

QUICK: dict[str, dict[str, object]] = {
    "gptq": {"polish_rounds": 1},
    "bcq": dict(QUICK_BCQ),
}
METHODS = [*QUICK]


def recipe(dataset, method="gptq", groups=4, *, options=None, scheme=None, **calibration):
    section = {"dataset": str(dataset), "num_samples": 6, "sequence_length": 64, **calibration}
    if groups is not None:
        section["output_groups"] = groups
    return recipe_from_mapping(
        {
            "calibration": section,
            "weights": {
                "method": method,
                "scheme": {"num_bits": 3, "group_size": 32, **(scheme or {})},
                "options": QUICK[method] | (options or {}),
            },
        }
    )


def weights_of(directory) -> str:
    return file_hashes(directory)["model.safetensors"]


def all_ones(monkeypatch):
    """Let every token weigh one."""

    def ones(_model, _blocks, edges, batches, _report):
        count = sum(batch.numel() for batch in batches)
        return {name: torch.ones(count, len(ends) - 1) for name, ends in edges.items()}

    monkeypatch.setattr(weigh_tokens, "squared_gradients", ones)


@pytest.mark.parametrize("method", METHODS)
def test_one_group_whose_tokens_weigh_alike_gives_the_same_bytes(
    llama, text_file, tmp_path, monkeypatch, method
):
    pipeline.quantize(Location(llama), tmp_path / "plain", recipe(text_file, method, None))
    all_ones(monkeypatch)
    pipeline.quantize(Location(llama), tmp_path / "one", recipe(text_file, method, 1))
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "plain")


def test_four_groups_whose_tokens_weigh_alike_change_nothing_but_rounding(
    llama, text_file, tmp_path, monkeypatch
):
    """Rows don't meet in a solver, but matrix products of fewer rows round otherwise, and shifts
    are of a strength that each group chooses: it is fixed here."""
    chosen = {"input_error": 0.5}
    plain = pipeline.quantize(
        Location(llama), tmp_path / "plain", recipe(text_file, "gptq", None, **chosen)
    )
    all_ones(monkeypatch)
    four = pipeline.quantize(Location(llama), tmp_path / "four", recipe(text_file, **chosen))
    assert four.average_bits == plain.average_bits
    for one, other in zip(four.layers, plain.layers, strict=True):
        assert one.metrics["output_error"] == pytest.approx(other.metrics["output_error"], rel=0.05)
    first, second = (CheckpointReader(tmp_path / name).manifest for name in ("four", "plain"))
    assert first.layers == second.layers


@pytest.mark.parametrize("method", METHODS)
def test_gradients_change_the_result(llama, text_file, tmp_path, method):
    for groups in (None, 1, 4):
        pipeline.quantize(
            Location(llama), tmp_path / str(groups), recipe(text_file, method, groups)
        )
    assert len({weights_of(tmp_path / str(groups)) for groups in (None, 1, 4)}) == 3
    sections = [
        CheckpointReader(tmp_path / name).manifest.recipe["calibration"] for name in ("None", "4")
    ]
    assert "output_groups" not in sections[0] and sections[1]["output_groups"] == 4


@pytest.mark.parametrize("finished", [9, 1])
def test_resumed_run_gives_the_same_bytes_and_weighs_once(
    llama, text_file, tmp_path, monkeypatch, finished
):
    chosen = recipe(text_file, groups=2)
    pipeline.quantize(Location(llama), tmp_path / "whole", chosen)
    done = 0

    def stop(event):
        nonlocal done
        done += isinstance(event, Progress) and event.what == "quantize"
        if done == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(Location(llama), tmp_path / "out", chosen, emit=stop)
    monkeypatch.setattr(weigh_tokens, "load_source", lambda *_: pytest.fail("weighed again"))
    pipeline.quantize(Location(llama), tmp_path / "out", chosen, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert file_hashes(tmp_path / "out")[name] == file_hashes(tmp_path / "whole")[name]


@torch.enable_grad()
def by_hand(llama, section, name):
    """Return inputs (tokens, in) and gradients of outputs (tokens, out) of all training tokens."""
    source, tokenizer = open_source(Location(llama)), load_tokenizer(llama)
    drawn = draw_calibration(section, source, tokenizer, lengths=None, seed=0)
    train, _ = drawn.split(section.holdout)
    model = load_original(llama, "cpu").double()
    seen = []

    def note(_module, arguments, output):
        output.retain_grad()
        seen.append((arguments[0][0].detach(), output))

    model.get_submodule(name).register_forward_hook(note)
    for sample in train.samples:
        logits = model(sample.unsqueeze(0), use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sample[1:], reduction="sum").backward()
    gradients = [output.grad[0] for _, output in seen]
    return torch.cat([x for x, _ in seen]), torch.cat(gradients)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.v_proj"])
def test_each_group_has_the_hessian_that_its_channels_gradients_weigh(
    llama, text_file, tmp_path, monkeypatch, layer
):
    """Of the first block, whose inputs aren't changed by anything quantized."""
    name, chosen, kept = f"model.layers.0.{layer}", recipe(text_file), {}
    real = solve_calibrated

    def spy(plan, weight, statistics, *rest):
        kept[plan.name] = [(each.rows, each.train.mean("xx")) for each in statistics]
        return real(plan, weight, statistics, *rest)

    monkeypatch.setattr(solve_layer, "solve_calibrated", spy)
    pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    x, gradients = by_hand(llama, chosen.calibration, name)
    rows = gradients.shape[1]
    assert [part for part, _ in kept[name]] == [
        slice(rows * k // 4, rows * (k + 1) // 4) for k in range(4)
    ]
    found = []
    for part, got in kept[name]:
        weights = gradients[:, part].square().mean(1)
        weights = weights / weights.mean()
        expected = (weights.unsqueeze(1) * x).T @ x / len(x)
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-4)
        found.append(got)
    plain = hessian_of(x)
    assert all(float((got - plain).norm() / plain.norm()) > 0.05 for got in found)


def hessian_of(x):
    total = torch.zeros(x.shape[1], x.shape[1])
    hessian.accumulate(total, x.float(), x.float())
    return total / len(x)


def plan(method, *, options=None, choose=(), rows=96, **scheme):
    made = load_method(method)
    return LayerPlan(
        name="layer",
        role="block",
        shape=Shape2D(rows, 64),
        scheme=WeightScheme(**{"num_bits": 3, "group_size": 32, **scheme}),
        method=method,
        options=replace(made.options(), **(options or {})),
        num_bytes=0,
        choose_group_dim=choose,
    )


ACROSS = {"group_dim": "out_features"}


@pytest.mark.parametrize(
    ("layer", "edges"),
    [
        (plan("gptq"), (0, 24, 48, 72, 96)),
        (plan("bcq", rows=3), (0, 1, 2, 3)),
        (plan("gptq", **ACROSS), (0, 32, 64, 96)),
        (plan("bcq", rows=300, **ACROSS), (0, 64, 160, 224, 300)),
        (plan("bcq", group_size=None, **ACROSS), (0, 96)),
        (plan("bcq", group_size=None), (0, 24, 48, 72, 96)),
        (plan("bcq", options={"scales": "coded"}), (0, 24, 48, 72, 96)),
        (plan("bcq", options={"scales": "coded"}, **ACROSS), (0, 96)),
        (plan("gptq", choose=("in_features", "out_features")), (0, 32, 64, 96)),
        (plan("bcq", rows=16, **ACROSS), (0, 16)),
    ],
)
def test_no_boundary_cuts_what_rows_share(layer, edges):
    assert row_edges(layer, 4) == edges


@pytest.mark.parametrize("options", [{}, {"scales": "coded"}])
@pytest.mark.parametrize("dim", ["in_features", "out_features"])
def test_every_grouping_is_solved_and_written_as_it_was_planned(
    llama, text_file, tmp_path, options, dim
):
    chosen = recipe(text_file, "bcq", 2, options=options, scheme={"group_dim": dim})
    result = pipeline.quantize(Location(llama), tmp_path / "out", chosen)
    for layer in CheckpointReader(tmp_path / "out").manifest.layers.values():
        assert layer.format == ("coded_scales" if options else "binary_coding")
        assert layer.scheme.group_dim == dim
    assert result.average_bits == pipeline.plan(Location(llama), chosen).average_bits


def test_weights_have_a_mean_of_one_over_what_is_solved_with():
    squared = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 5.0]])
    assert scaled(squared, 2).tolist() == [[0.5, 1.0], [1.5, 1.0], [4.0, 1.0]]
    assert bool(torch.isfinite(scaled(torch.eye(1, 100_000).T, 100_000)).all())


def test_groups_give_their_rows_and_the_roots_of_their_weights():
    groups = RowGroups((0, 2, 5), torch.tensor([[1.0, 4], [9, 0], [16, 25]]).half())
    first, second = groups.among(slice(1, 3), torch.device("cpu"))
    assert first[0] == slice(0, 2) and first[1].flatten().tolist() == [3, 4]
    assert second[0] == slice(2, 5) and second[1].flatten().tolist() == [0, 5]


def test_few_tokens_with_nearly_all_the_weight_are_few_tokens():
    weights = torch.tensor([[1.0, 100], [1, 0], [1, 0], [1, 0], [50, 50]]).half()
    groups = RowGroups((0, 1, 2), weights)
    assert groups.effective(0, 4) == 4 and groups.effective(1, 4) == 1
