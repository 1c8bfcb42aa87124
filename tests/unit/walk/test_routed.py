"""What experts see in the walk, against what transformers' own router and experts do."""

from functools import partial

import pytest
import torch

from qtool import pipeline
from qtool.base import Env, Notice
from qtool.checkpoint.reader import CheckpointReader
from qtool.core.experts import expert_name
from qtool.data.calibration import CalibrationSet
from qtool.modeling.locate import Location
from qtool.modeling.source import open_source
from qtool.recipe.calibration import CalibrationSection
from qtool.recipe.load import recipe_from_mapping
from qtool.walk.solved import SolvedLinear
from qtool.walk.walk import Walk
from tests import families, mixtures

transformers = pytest.importorskip("transformers", minversion="5.0")

FIRST, LAST = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def saved(directory, name="mixtral", change=None, **changes):
    model = mixtures.build(name, **changes)
    if change is not None:
        change(model)
    model.save_pretrained(directory)
    families.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Return a walk of a model whose first block has half of its experts rounded, and both."""
    directory = saved(tmp_path_factory.mktemp("walk"), intermediate_size=128)
    source = open_source(Location(directory))
    tokens = torch.randint(3, 90, (6, 20), generator=torch.Generator().manual_seed(0))
    samples = CalibrationSet(samples=tuple(tokens), provenance={})
    layers = {name: source.weight_shape(name) for name in source.block_linears()}
    section = CalibrationSection(dataset="text.txt", holdout=0.34)
    walk = Walk(source, layers, samples, section, Env(device="cpu"))
    attention = "model.layers.0.self_attn.o_proj"
    rounded = {attention: source.read_weight(attention).mul(8).round().div(8)}
    rounded |= {f"{FIRST}[{i}]": source.read_weight(f"{FIRST}[{i}]") * 0.9 for i in range(4)}
    for name, weight in rounded.items():
        walk.put(name, SolvedLinear(partial(torch.clone, weight)))
    return walk, directory, tokens, rounded


def routed(directory, tokens, changes):
    """Return what transformers gives its experts: tokens, who gets which, and their weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in changes.items():
            mixtures.fused_weight(model, name).copy_(weight)
    seen = []
    experts = model.model.layers[0].mlp.experts
    with experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments)):
        model(tokens)
    return *seen[0][:2], experts


@pytest.mark.parametrize("layer", [f"{FIRST}[1]", f"{LAST}[2]"])
@torch.no_grad()
def test_statistics_are_those_of_the_tokens_routed_to_an_expert(walked, layer):
    walk, directory, tokens, rounded = walked
    x, index, experts = routed(directory, tokens[:4], rounded)
    reference, _, original = routed(directory, tokens[:4], {})
    expert = expert_name(layer)
    assert expert is not None
    rows = (index == expert.number).any(-1)
    x, reference = x[rows], reference[rows]
    if expert.weight == "down_proj":
        x, reference = (
            module._apply_gate(each @ module.gate_up_proj[expert.number].T)
            for module, each in ((experts, x), (original, reference))
        )
    found = walk.expert_statistics(layer)
    assert found.tokens == int(rows.sum())
    train = found.candidates["routed"]().train
    x, reference = x.double(), reference.double()
    torch.testing.assert_close(train.sums["xx"].double(), x.T @ x, rtol=1e-4, atol=1e-5)
    drift = reference - x
    torch.testing.assert_close(train.sums["dx"].double(), drift.T @ x, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_few_tokens_bring_more_candidates_all_judged_alike(walked):
    walk, *_ = walked
    statistics = walk.expert_statistics(f"{LAST}[0]")
    made = {name: make() for name, make in statistics.candidates.items()}
    assert set(made) == {"routed", "all", "pooled"}  # fewer tokens than inputs
    assert len({id(each.held_out) for each in made.values()}) == 1
    assert made["all"].train.num_tokens == 4 * 20
    assert made["pooled"].train.num_tokens == 2 * 4 * 20  # two experts per token
    assert set(walk.expert_statistics(f"{FIRST}[0]").candidates) <= {"routed", "all"}


def test_an_expert_without_tokens_is_solved_for_those_of_others_and_that_is_recorded(tmp_path):
    def starve(model):
        bias = model.model.layers[1].mlp.router.bias.data
        bias[:] = torch.tensor([0.0, 0.0, 0.0, -1e4])

    directory = saved(tmp_path / "source", "gpt_oss", starve)
    text = tmp_path / "text.txt"
    text.write_text(families.text(600))
    calibration = {"dataset": str(text), "num_samples": 6, "sequence_length": 24}
    weights = {"method": "gptq", "scheme": {"num_bits": 4, "group_size": 32}}
    notices = []
    result = pipeline.quantize(
        Location(directory),
        tmp_path / "out",
        recipe_from_mapping({"weights": weights, "calibration": calibration}),
        emit=lambda event: notices.append(event.message) if isinstance(event, Notice) else None,
    )
    part = result.experts["model.layers.1.mlp.experts"]
    assert part["tokens"][3] == 0
    assert part["starved"]["gate_up_proj[3]"] == "all"
    assert part["starved"]["down_proj[3]"] in ("all", "pooled")
    entries = CheckpointReader(tmp_path / "out").manifest.layers
    assert entries["model.layers.1.mlp.experts.gate_up_proj[3]"].tokens_from == "all"
    assert any("the fewest, 0, expert 3 of model.layers.1.mlp.experts" in one for one in notices)
