"""`qtool adapt` as a user sees it: from chats to a model that answers, and what is refused."""

import io
import json
import shutil

import pytest
import torch

from qtool import pipeline
from qtool.base import QuantizedTensor
from qtool.checkpoint.reader import CheckpointReader
from qtool.integrations.transformers.generate import use_runner
from qtool.modeling.adapters import disable_adapter, load_adapter
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from qtool.runtime.backends._choose import use_backend
from tests.cli.conftest import Cli
from tests.helpers import QUICK_BCQ, normal, recipe

FAST = ("--epochs", "2", "--batch-size", "8", "--learning-rate", "0.05")


@pytest.fixture(scope="module")
def folder(chat_llama, tiny, tmp_path_factory):
    """Return a folder with bases `w3` and `gpt2`, and `chats.jsonl`."""
    folder = tmp_path_factory.mktemp("adapting")
    scheme = {"num_bits": 3, "group_size": 32}
    weights = {"method": "bcq", "options": QUICK_BCQ, "scheme": scheme}
    for model, name in ((chat_llama, "w3"), (tiny("gpt2"), "gpt2")):
        made = recipe_from_mapping({"weights": weights})
        pipeline.quantize(Location(model), folder / name, made)
    words = torch.randint(3, 96, (40, 3), generator=torch.Generator().manual_seed(0)).tolist()
    turns = [[("user", f"w{a} w{b}"), ("assistant", f"w{c} w7 w7")] for a, b, c in words]
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in turns]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(lines)
    pairs = [{"prompt": f"w{a} w{b}", "completion": f" w{c} w7"} for a, b, c in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    """Return an adapter of `w3`."""
    from qtool.pipeline.adapt import AdaptRequest, adapt
    from qtool.steps.adapt_model import AdaptOptions

    options = AdaptOptions(epochs=6, batch_size=8, learning_rate=0.05)
    where = Location(folder / "w3")
    directory, data = folder / "sevens", folder / "chats.jsonl"
    adapt(AdaptRequest(model=where, data=data, directory=directory, options=options))
    return directory


def test_from_chats_to_answers_with_three_commands(cli: Cli, folder, monkeypatch):
    done = cli(
        *("adapt", folder / "w3", folder / "chats.jsonl", folder / "mine"),
        *(*FAST, "--json", folder / "result.json", "--plot", folder / "curve.svg", "--packing"),
    )
    assert done.code == 0, done.err
    assert "numbers learned" in done.out
    assert "<svg" in (folder / "curve.svg").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result["loss"] < result["loss_before"]
    assert result["trainable_parameters"] * 2 == result["adapter_bytes"]
    evaluated = []
    for options in ((), ("--adapter", folder / "mine")):
        done = cli(
            *("eval", folder / "w3", "--context-length", "32", "--windows", "2", "--no-chats"),
            *("--json", "-", *options),
        )
        assert done.code == 0, done.err
        evaluated.append(json.loads(done.out)["figures"][0])
    assert evaluated[0]["name"] == "w3"
    assert evaluated[1]["name"] == "w3 with mine"
    assert evaluated[0]["perplexity"] != evaluated[1]["perplexity"]
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w4\n"))
    said = cli(
        *("chat", folder / "w3", "--adapter", folder / "mine", "--temperature", "0"),
        *("--max-tokens", "3"),
    )
    assert said.code == 0, said.err
    assert len(said.out.split()) == 3


@pytest.fixture(scope="module")
def low_rank(folder):
    """Return an adapter of low rank that says something else than the base, on some linears."""
    from qtool.checkpoint.adapter_files import Adapter, write_adapter
    from qtool.modeling.adapters import digest_of_base, quantized_modules

    model = load_model(Location(folder / "w3"), device="cpu").model
    layers = {}
    for seed, (name, module) in enumerate(quantized_modules(model).items()):
        if name.endswith(("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")):
            outputs, inputs = module.entry.shape
            down, up = normal(3, inputs, seed=seed) / 8, normal(outputs, 3, seed=99 + seed) / 4
            layers[name] = {"down": down.half(), "up": up.half()}
    made = Adapter(kind="lora", base=digest_of_base(model), layers=layers)
    write_adapter(folder / "made", made)
    return folder / "made"


@pytest.mark.parametrize("backend", [None, "dense", "reference"])
@pytest.mark.parametrize("kind", ["adapter", "low_rank"])
def test_the_decode_runner_runs_adapters(folder, kind, backend, request):
    adapter = request.getfixturevalue(kind)
    with use_backend(backend):
        _compare_runner(folder, adapter)


def _compare_runner(folder, adapter):
    model = load_model(Location(folder / "w3"), device="cpu").model
    ids = torch.arange(3, 15).view(2, 6)
    wanted = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def both():
        found = []
        for mode in ("never", "always"):
            with use_runner(mode):
                found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **wanted))
        assert torch.equal(*found)
        return found[0]

    plain = both()
    load_adapter(model, adapter)
    adapted = both()
    assert not torch.equal(plain, adapted)
    disable_adapter(model)
    assert torch.equal(both(), plain)


@pytest.mark.parametrize("base", ["w3", "gpt2"])
def test_merged_scales_are_the_adapter_to_the_bit(cli: Cli, folder, base):
    mine, out = folder / f"{base}-mine", folder / f"{base}-merged"
    done = cli("adapt", folder / base, folder / "pairs.jsonl", mine, *FAST)
    assert done.code == 0, done.err
    done = cli("adapt", folder / base, mine, out, "--merge")
    assert done.code == 0, done.err
    assert "exact" in done.out
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        merged = load_model(Location(out), device="cpu").model(ids).logits
        beside = load_model(Location(folder / base, adapter=mine), device="cpu").model(ids).logits
        plain = load_model(Location(folder / base), device="cpu").model(ids).logits
    assert torch.equal(merged, beside)
    assert not torch.equal(merged, plain)
    assert cli("inspect", out, "--verify").code == 0
    done = cli("adapt", folder / base, mine, out, "--merge")
    assert (done.code, "Pass --overwrite" in done.err) == (1, True)


def test_planes_of_a_merged_checkpoint_are_in_order(cli: Cli, folder):
    """A rate at which first planes' scales fall below others', whatever they learn."""
    mine, out = folder / "far", folder / "far-merged"
    fast = (*FAST[:-1], "0.5")
    done = cli("adapt", folder / "w3", folder / "pairs.jsonl", mine, *fast)
    assert done.code == 0, done.err
    assert cli("adapt", folder / "w3", mine, out, "--merge").code == 0
    reader = CheckpointReader(out)
    tensors = [reader.load(name) for name in reader.manifest.layers]
    scales = [each.parts["plane_scales"] for each in tensors if isinstance(each, QuantizedTensor)]
    assert scales
    assert all(bool((each[:-1] >= each[1:]).all()) for each in scales)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        merged = load_model(Location(out), device="cpu").model(ids).logits
        beside = load_model(Location(folder / "w3", adapter=mine), device="cpu").model(ids).logits
    torch.testing.assert_close(merged, beside, rtol=1e-3, atol=1e-4)


def test_merging_low_rank_says_what_is_lost(cli: Cli, folder):
    pytest.importorskip("peft")
    mine, out = folder / "lora", folder / "lora-merged"
    pairs = folder / "pairs.jsonl"
    done = cli("adapt", folder / "w3", pairs, mine, *FAST, "--method", "lora", "--set", "rank=2")
    assert done.code == 0, done.err
    done = cli("adapt", folder / "w3", mine, out, "--merge", "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["lost"] > 0
    assert "of the change is lost" in done.err


@pytest.mark.parametrize("fault", ["another base", "a damaged byte", "no base"])
def test_an_adapter_that_cant_be_set_is_refused_before_a_model_is_loaded(
    fault, cli: Cli, folder, adapter, chat_llama, tmp_path, monkeypatch
):
    base, said = tmp_path / "w4", "isn't what was written"
    if fault == "another base":
        pipeline.quantize(Location(chat_llama), base, recipe())
        said = "is an adapter of another base, w3"
    elif fault == "no base":
        base, said = chat_llama, "in this model nothing is quantized"
    else:
        base, adapter = folder / "w3", shutil.copytree(adapter, tmp_path / "damaged")
        content = (adapter / "adapter.safetensors").read_bytes()
        (adapter / "adapter.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr("qtool.modeling.load._from_pretrained", None)
    commands = [
        ("eval", base, "--adapter", adapter, "--no-chats"),
        ("chat", base, "--adapter", adapter),
        ("serve", base, "--adapter", adapter, "--port", "0"),
        ("bench", base, "--adapter", adapter, "--baseline", chat_llama),
    ]
    if fault != "no base":
        commands.append(("adapt", base, adapter, tmp_path / "never", "--merge"))
    for command in commands:
        done = cli(*command)
        assert done.code == 1
        assert len(done.said) == 1, done.err
        assert said in done.err
    assert not (tmp_path / "never").exists()


REFUSED = {
    "no data": (("adapt", "w3", "nowhere.jsonl", "x"), 1, "No file"),
    "no adapter": (("eval", "w3", "--adapter", "nowhere"), 1, "nowhere is no adapter: No file"),
    "not quantized": (("adapt", "plain", "chats.jsonl", "x"), 1, "isn't quantized"),
    "unknown method": (
        ("adapt", "w3", "chats.jsonl", "x", "--method", "alfa"),
        1,
        "No 'alfa' in adapters. Did you mean 'alpha'?",
    ),
    "no template": (("adapt", "gpt2", "chats.jsonl", "x"), 1, "has no chat template"),
    "merging and training": (
        ("adapt", "w3", "sevens", "x", "--merge", "--epochs", "2"),
        2,
        "--epochs: --merge trains nothing",
    ),
    "no original": (
        ("adapt", "w3", "chats.jsonl", "x", "--method", "ra-lora"),
        1,
        "give --original",
    ),
    "no value": (("adapt", "w3", "chats.jsonl", "x", "--set", "rank"), 2, "takes KEY=VALUE"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("adapter")
def test_what_is_refused_is_one_sentence(cli: Cli, folder, chat_llama, name, monkeypatch):
    arguments, code, said = REFUSED[name]
    monkeypatch.chdir(folder)
    if not (folder / "plain").exists():
        (folder / "plain").symlink_to(chat_llama)
    done = cli(*arguments)
    assert done.code == code, done.err
    assert said in " ".join(done.err.replace("│", " ").split())
    assert not (folder / "x").exists()
    if code == 1:
        assert len(done.said) == 1


def test_answers_are_compared_with_what_people_wrote(cli: Cli, folder, adapter):
    pytest.importorskip("sacrebleu")
    file = folder / "asked.jsonl"
    pairs = [("w3 w4", " w5 w7"), ("w3 w4", " w6 w7"), ("w8", " w9 w7")]
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli(
        *("eval", folder / "w3", "--baseline", folder / "w3", "--adapter", adapter),
        *("--pairs", file, "--answer-tokens", "3", "--json", "-"),
    )
    assert done.code == 0, done.err
    plain, adapted = json.loads(done.out)["models"]
    assert (plain["name"], adapted["name"]) == ("w3", "w3 with sevens")
    assert plain["answers"] != adapted["answers"]
    assert (plain["scores"]["prompts"], plain["scores"]["references"]) == (2, 3)
    done = cli("eval", folder / "w3", "--pairs", file, "--windows", "2")
    assert (done.code, "--windows goes without --pairs" in done.err) == (2, True)
    done = cli("eval", folder / "w3", "--prompts", "2")
    assert (done.code, "--prompts needs --pairs" in done.err) == (2, True)
