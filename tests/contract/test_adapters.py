"""Every kind of adapter: the base stays what it is, and what was trained is what is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool.training.adapters
from qtool import pipeline, plugins
from qtool.base import Notice, Progress
from qtool.checkpoint.adapter_files import ADAPTER_FILES, read_adapter
from qtool.errors import CheckpointError, ModelError, OutputError, RecipeError
from qtool.modeling.adapters import disable_adapter, load_adapter, quantized_modules, set_adapter
from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.pipeline.adapt import AdaptRequest, AdaptResult, adapt
from qtool.recipe.load import recipe_from_mapping
from qtool.steps import adapt_model as steps
from qtool.steps.adapt_model import AdaptOptions
from qtool.training.adapters import load_kind
from tests.helpers import QUICK_BCQ, file_hashes

KINDS = plugins.command_names(qtool.training.adapters)
OPTIONS: dict[str, dict[str, Any]] = {"lora": {"rank": 2}, "ra-lora": {"rank": 2, "max_rank": 6}}
IDS = torch.arange(3, 27).view(2, 12)
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return lines that teach to repeat the last word."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = torch.randint(3, 96, (40, 4), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [
        {"prompt": " ".join(f"w{w}" for w in row), "completion": f" w{row[-1]}"} for row in words
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory) -> Path:
    """Return a tiny llama of two bits in binary coding."""
    out_dir = tmp_path_factory.mktemp("base") / "w2"
    scheme = {"num_bits": 2, "group_size": 32}
    weights = {"method": "bcq", "options": QUICK_BCQ, "scheme": scheme}
    pipeline.quantize(Location(llama), out_dir, recipe_from_mapping({"weights": weights}))
    return out_dir


def run(kind: str, base: Path, original: Path, data: Path, directory: Path, **more: Any) -> Any:
    options = AdaptOptions(
        epochs=2, batch_size=8, learning_rate=0.04, kind_options=OPTIONS.get(kind, {})
    )
    request = AdaptRequest(
        model=Location(base),
        original=Location(original),
        data=data,
        directory=directory,
        kind=kind,
        options=options,
        **{key: value for key, value in more.items() if key != "emit"},
    )
    return adapt(request, emit=more.get("emit", lambda _: None))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, base, llama, data, tmp_path_factory) -> Iterator[tuple[str, AdaptResult]]:
    directory = tmp_path_factory.mktemp("adapters") / request.param
    before = file_hashes(base)
    said: list[Any] = []
    result = run(request.param, base, llama, data, directory, emit=said.append)
    assert file_hashes(base) == before
    told = {event.what for event in said if isinstance(event, Progress)}
    assert len(told) <= 5, "a layer is no step: each step is a line where no terminal is"
    yield request.param, result


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def parts(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_learns_and_leaves_only_its_own_files(trained):
    _, result = trained
    assert result.best_loss < result.first_loss
    assert {path.name for path in result.directory.iterdir()} <= set(ADAPTER_FILES)
    curve = [
        json.loads(line) for line in (result.directory / "curve.jsonl").read_text().splitlines()
    ]
    assert curve[-1]["step"] == result.steps
    assert min(point["held_out"] for point in curve) == result.best_loss
    assert not result.directory.with_name(f"{result.directory.name}.partial").exists()


def test_what_was_trained_is_what_is_loaded(trained, base, llama, data, tmp_path, monkeypatch):
    kind, _ = trained
    seen: dict[str, torch.Tensor] = {}
    whole = steps.adapt_model

    def watched(subject, *arguments):
        stored = parts(subject.loaded.model)
        done = whole(subject, *arguments)
        model = subject.loaded.model
        seen["with"] = logits(model)
        done.installed.remove()
        model.requires_grad_(requires_grad=False)
        after = parts(model)
        assert after.keys() == stored.keys()
        assert all(torch.equal(after[name], stored[name]) for name in stored)
        return done

    monkeypatch.setattr("qtool.pipeline.adapt.adapt_model", watched)
    run(kind, base, llama, data, tmp_path / "again")
    model = load_model(Location(base), device="cpu").model
    load_adapter(model, tmp_path / "again")
    torch.testing.assert_close(logits(model), seen["with"], rtol=2e-3, atol=2e-3)


def test_switching_off_gives_the_base_to_the_bit_and_on_the_adapter(trained, base):
    _, result = trained
    model = load_model(Location(base), device="cpu").model
    before, plain = parts(model), logits(model)
    name = load_adapter(model, result.directory)
    adapted = logits(model)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in parts(model).items())
    disable_adapter(model)
    assert torch.equal(logits(model), plain)
    load_adapter(model, result.directory, "second")
    set_adapter(model, name)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ModelError, match=r"No adapter third is loaded; known: .*second"):
        set_adapter(model, "third")


def test_a_location_with_an_adapter_is_that_model(trained, base):
    _, result = trained
    loaded = load_model(Location(base, adapter=result.directory), device="cpu")
    assert loaded.name == f"{base.name} with {result.directory.name}"
    model = load_model(Location(base), device="cpu").model
    load_adapter(model, result.directory)
    assert torch.equal(logits(loaded.model), logits(model))


def test_an_interrupted_run_resumes_to_the_same_curve(trained, base, llama, data, tmp_path):
    kind, result = trained

    def stop(event: Progress | Notice) -> None:
        if isinstance(event, Progress) and event.what == "adapt" and event.done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(kind, base, llama, data, tmp_path / "a", emit=stop)
    assert not (tmp_path / "a").exists()
    with pytest.raises(OutputError, match=r"unfinished run\. Continue it with --resume"):
        run(kind, base, llama, data, tmp_path / "a")
    told: list[Progress | Notice] = []
    run(kind, base, llama, data, tmp_path / "a", resume=True, emit=told.append)
    first = next(event for event in told if isinstance(event, Progress) and event.what == "adapt")
    assert first.done >= 4
    curve = (result.directory / "curve.jsonl").read_text()
    assert (tmp_path / "a" / "curve.jsonl").read_text() == curve
    assert read_adapter(tmp_path / "a").about == read_adapter(result.directory).about
    for layer, stored in read_adapter(tmp_path / "a").layers.items():
        for part, tensor in read_adapter(result.directory).layers[layer].items():
            assert torch.equal(stored[part], tensor)


def test_recomputing_blocks_changes_nothing(trained, base, llama, data, tmp_path, monkeypatch):
    kind, result = trained
    monkeypatch.setattr(steps, "LARGE_MODEL", 1)
    again = run(kind, base, llama, data, tmp_path / "a")
    assert again.best_loss == pytest.approx(result.best_loss, abs=1e-5)


def test_another_run_is_neither_resumed_nor_lost(base, llama, data, tmp_path):
    folder = tmp_path / "a.partial"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="left alone"):
        run("alpha", base, llama, data, tmp_path / "a", overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds what isn't an adapter of qtool: mine.txt"):
        run("alpha", base, llama, data, tmp_path / "b", overwrite=True)
    with pytest.raises(
        RecipeError, match=r"No 'planse' in --set of 'adapt'. Did you mean 'planes'"
    ):
        adapt(
            AdaptRequest(
                model=Location(base),
                data=data,
                directory=tmp_path / "c",
                options=AdaptOptions(kind_options={"planse": 1}),
            )
        )


def test_an_adapter_of_another_base_is_refused_in_a_sentence(trained, checkpoint):
    _, result = trained
    model = load_model(Location(checkpoint), device="cpu").model
    with pytest.raises(CheckpointError, match=r"is an adapter of another base, w2: .*qtool adapt"):
        load_adapter(model, result.directory)
    assert not any(module.adapter for module in quantized_modules(model).values())


def test_adapters_go_on_quantized_models_only(trained, llama):
    _, result = trained
    model = load_model(Location(llama), device="cpu").model
    with pytest.raises(ModelError, match="nothing is quantized"):
        load_adapter(model, result.directory)


DAMAGE = {
    "a byte": "isn't what was written",
    "cut short": "can't be read",
    "no manifest": "is no adapter: it has no adapter.json",
    "another version": "is of adapter version 7, and this qtool knows 1",
    "not JSON": "can't be read",
    "not ours": "isn't that of an adapter of qtool",
    "no digests": "lacks kind, base or digests",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_in_a_sentence(trained, damage, tmp_path):
    _, result = trained
    folder = tmp_path / "a"
    folder.mkdir()
    for file in result.directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest, tensors = folder / "adapter.json", folder / "adapter.safetensors"
    values, content = json.loads(manifest.read_text()), tensors.read_bytes()
    if damage == "a byte":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut short":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "not JSON":
        manifest.write_text("{")
    else:
        changes: dict[str, dict[str, Any]] = {
            "another version": {"adapter_version": 7},
            "not ours": {"this is": "mine"},
            "no digests": {"digests": None},
        }
        manifest.write_text(json.dumps({**values, **changes[damage]}))
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_says_what_it_is(kind):
    found = load_kind(kind)
    assert found.summary.endswith(".")
    assert found.learning_rate > 0
    assert found.options() == found.options()
