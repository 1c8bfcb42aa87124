"""Every training recipe: what it writes opens, goes on where it was stopped, keeps a good state."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import qtool.training.recipes
from qtool import pipeline, plugins
from qtool.base import Notice, Progress
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import DataError, ModelError, OutputError, RecipeError, SchemeError
from qtool.modeling.load import load_model, load_source, load_tokenizer
from qtool.modeling.locate import Location
from qtool.pipeline.quantize_and_train import quantize_and_train
from qtool.pipeline.train import train
from qtool.pipeline.train_request import TrainRequest, TrainResult
from qtool.recipe.load import recipe_from_mapping
from qtool.steps.train_model import TrainOptions, train_stages
from qtool.training.recipes import load_training
from tests import families
from tests.helpers import QUICK_BCQ, file_hashes

TRAININGS = [
    name
    for name in plugins.command_names(qtool.training.recipes)
    if not load_training(name).is_dense
]
WEIGHTS = {
    "weights": {
        "method": "bcq",
        "options": QUICK_BCQ,
        "scheme": {"num_bits": 2, "group_size": 32},
    }
}
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": families.text(12, seed)} for seed in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("base") / "w2"
    pipeline.quantize(Location(llama), out_dir, recipe_from_mapping(WEIGHTS))
    return out_dir


@pytest.fixture
def run(base, llama, texts, tmp_path):
    """Return what trains: (recipe, emit, **options) -> result, events."""

    def go(recipe: str, emit: Any = None, **more: Any) -> tuple[TrainResult, list[Any]]:
        events: list[Any] = []
        own = {"steps": 8, "batch_size": 4, "checks": 4, "learning_rate": 0.01}
        switches = {key: more.pop(key) for key in ("resume", "overwrite") if key in more}
        out_dir = more.pop("out_dir", tmp_path / "out")
        request = TrainRequest(
            model=Location(more.pop("model", base)),
            original=Location(more.pop("original", llama)),
            data=more.pop("data", texts),
            validation=more.pop("validation", None),
            out_dir=out_dir,
            recipe=recipe,
            options=TrainOptions(**{**own, **more}),
            **switches,
        )

        def hear(event: Any) -> None:
            events.append(event)
            if emit is not None:
                emit(event)

        return train(request, emit=hear), events

    return go


@pytest.mark.parametrize("recipe", TRAININGS)
def test_what_is_trained_is_an_ordinary_checkpoint(recipe, run, base, llama):
    before = file_hashes(base), file_hashes(llama)
    done, _ = run(recipe)
    assert (file_hashes(base), file_hashes(llama)) == before
    assert done.best_loss < done.first_loss
    reader = CheckpointReader(done.out_dir)
    assert reader.verify() > 0
    assert set(reader.manifest.layers) == set(CheckpointReader(base).manifest.layers)
    with torch.no_grad():
        was, now = (
            load_model(Location(where), device="cpu").model(IDS).logits
            for where in (base, done.out_dir)
        )
    assert torch.isfinite(now).all()
    assert not torch.equal(was, now)


def divergence_of(where: Path, original: Path, lines: Path) -> float:
    """Return KL to the original over all tokens of texts, each read by itself: nats per token."""
    tokenizer = load_tokenizer(original)
    models = [load_model(Location(each), device="cpu").model for each in (original, where)]
    found = []
    for line in lines.read_text().splitlines():
        tokens = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            wanted, made = (model(tokens).logits[0].double().log_softmax(-1) for model in models)
        found.append((wanted.exp() * (wanted - made)).sum(-1))
    return float(torch.cat(found).mean())


ONLY_LOGITS = {"hidden": 0.0, "scores": 0.0, "attention": 0.0}
BEGINS_ANEW = ("flexor", "pnr")
"""Recipes that begin at another weight than the checkpoint's."""


@pytest.mark.parametrize("recipe", TRAININGS)
def test_losses_are_the_divergence_of_the_files_whatever_a_batch_is(
    recipe, run, base, llama, texts
):
    lines = [{"text": families.text(3 + 7 * n, seed=90 + n)} for n in range(5)]
    unlike = texts.with_name("unlike.jsonl")
    unlike.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = run(recipe, validation=unlike, kind_options=ONLY_LOGITS, batch_size=2)[0]
    expected = divergence_of(said.out_dir, llama, unlike)
    assert said.best_loss == pytest.approx(expected, rel=1e-3)
    if recipe not in BEGINS_ANEW:
        assert said.first_loss == pytest.approx(divergence_of(base, llama, unlike), rel=1e-3)


@pytest.mark.parametrize("recipe", TRAININGS)
def test_a_run_that_was_stopped_goes_on_to_the_same_result(recipe, run, tmp_path):
    whole, _ = run(recipe)

    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.what == "train" and event.done == 4:
            raise KeyboardInterrupt

    where = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, stop, out_dir=where)
    assert not where.exists()
    with pytest.raises(OutputError, match="--resume"):
        run(recipe, out_dir=where)
    again, events = run(recipe, out_dir=where, resume=True)
    points = [e.done for e in events if isinstance(e, Progress) and e.what == "train"]
    assert 0 not in points, "what was done is done again"
    (weights,) = (path.name for path in where.glob("*.safetensors"))
    assert file_hashes(where)[weights] == file_hashes(whole.out_dir)[weights]
    assert again.best_loss == pytest.approx(whole.best_loss, abs=1e-9)


def test_a_run_that_has_ended_is_not_trained_again(run, tmp_path, monkeypatch):
    """Neither one that has written all but had no time to give it its name."""
    whole, _ = run("flexor", steps=2)
    where, publish = tmp_path / "again", CheckpointWriter.publish

    def stop(_self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        run("flexor", steps=2, out_dir=where)
    monkeypatch.setattr(CheckpointWriter, "publish", publish)
    for _ in range(2):
        again, events = run("flexor", steps=2, out_dir=where, resume=True)
        assert not any(isinstance(e, Progress) and e.what == "train" for e in events)
        assert replace(again, seconds=whole.seconds, out_dir=whole.out_dir) == whole
        assert again.seconds > 0


@pytest.mark.parametrize("changed", ["original", "model"])
def test_a_run_does_not_go_on_with_another_model_of_the_same_name(
    changed, run, base, llama, tmp_path
):
    where = {"original": llama, "model": base}[changed]
    copy = Path(shutil.copytree(where, tmp_path / "copies" / where.name))

    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.what == "train" and event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("distillation", stop, **{changed: copy})
    if changed == "original":
        families.build("llama", seed=7).save_pretrained(copy)
    else:
        (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(OutputError, match="was started with another"):
        run("distillation", resume=True, **{changed: copy})


@pytest.mark.parametrize("recipe", TRAININGS)
def test_the_original_stays_what_it_is(recipe, run, monkeypatch):
    module, seen = importlib.import_module("qtool.pipeline.train"), []

    def keep(*given: Any) -> Any:
        model = load_source(*given)
        seen.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        return model

    monkeypatch.setattr(module, "load_source", keep)
    run(recipe, steps=3)
    ((model, before),) = seen
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.grad is None for value in model.parameters())


def test_products_in_bfloat16_learn_nearly_the_same(run, tmp_path):
    whole, _ = run("teacher-intervention")
    mixed, _ = run("teacher-intervention", precision="bfloat16", out_dir=tmp_path / "mixed")
    assert mixed.best_loss < mixed.first_loss
    assert mixed.best_loss != whole.best_loss, "nothing ran in bfloat16"
    assert mixed.best_loss == pytest.approx(whole.best_loss, rel=0.05)


def test_a_dense_model_is_quantized_and_trained_at_once(llama, texts, tmp_path):
    weights = {**WEIGHTS["weights"], "method": "rtn", "options": {}}
    training = {"name": "teacher-intervention", "learning_rate": 0.01, "options": {"share": 0.5}}
    recipe = recipe_from_mapping({"weights": weights, "training": training})
    own = TrainOptions(steps=4, batch_size=4, checks=1, kind_options={"hidden": 0.5})
    request = TrainRequest(
        model=Location(llama), data=texts, out_dir=tmp_path / "out", recipe="", options=own
    )
    done = quantize_and_train(recipe, request)
    assert done.best_loss < done.first_loss
    assert done.recipe == "teacher-intervention"
    begun = CheckpointReader(tmp_path / "out.quantized")
    assert set(CheckpointReader(done.out_dir).manifest.layers) == set(begun.manifest.layers)
    with pytest.raises(OutputError, match="out"):
        quantize_and_train(recipe, request)
    again = replace(request, model=Location(begun.directory), original=Location(llama))
    other = quantize_and_train(recipe, replace(again, out_dir=tmp_path / "again"))
    assert other.best_loss == done.best_loss
    with pytest.raises(RecipeError, match="no section `training`"):
        quantize_and_train(recipe_from_mapping(WEIGHTS), request)


def test_a_rate_of_nothing_is_taken_at_its_word(run):
    done, _ = run("distillation", steps=2, learning_rate=0.0, kind_options={"code_rate": 0})
    assert done.best_loss == done.first_loss


def test_parts_of_a_batch_are_learned_from_as_the_whole(run, tmp_path):
    whole, _ = run("distillation", steps=3)
    parts, _ = run("distillation", steps=3, accumulate=4, out_dir=tmp_path / "parts")
    assert parts.best_loss == pytest.approx(whole.best_loss, rel=1e-3)


def test_blocks_that_run_once_more_on_the_way_back_learn_the_same(run, tmp_path):
    whole, _ = run("teacher-intervention", steps=4)
    again, _ = run("teacher-intervention", steps=4, recompute=True, out_dir=tmp_path / "again")
    assert again.best_loss == pytest.approx(whole.best_loss, rel=1e-3)


def test_stored_bits_of_flexor_are_counted_apart_from_what_runs(run):
    done, _ = run("flexor", steps=2)
    reader = CheckpointReader(done.out_dir)
    assert {entry.format for entry in reader.manifest.layers.values()} == {"encrypted_planes"}
    assert done.notes["plane_bits_running"] == 2
    assert 1.6 <= done.notes["plane_bits_stored"] < 2  # rows that end within a slice
    with pytest.raises(SchemeError, match="no more inputs than outputs"):
        run("flexor", kind_options={"inputs": 12}, out_dir=done.out_dir.with_name("other"))


def test_networks_of_flexor_differ_by_layer_where_that_is_asked(run):
    own = {"planes": 1, "overrides": [{"match": "*.down_proj", "planes": 2, "inputs": 4}]}
    done, _ = run("flexor", steps=2, kind_options=own)
    layers = CheckpointReader(done.out_dir).manifest.layers
    found = {name: entry.scheme for name, entry in layers.items()}
    assert {one.num_bits for name, one in found.items() if name.endswith("down_proj")} == {2}
    assert {one.num_bits for name, one in found.items() if name.endswith("up_proj")} == {1}
    with pytest.raises(RecipeError, match=r"'\*\.dwn' matches no"):
        run("flexor", kind_options={"overrides": [{"match": "*.dwn"}]}, overwrite=True)


def test_pruning_by_movement_goes_on_to_the_same_result(run, tmp_path):
    own = {"compression": "prune", "saliency": "movement", "period": 2}
    whole, _ = run("pnr", learning_rate=1e-3, kind_options=own)
    other, _ = run(
        "pnr",
        learning_rate=1e-3,
        out_dir=tmp_path / "largest",
        kind_options=own | {"saliency": "magnitude"},
    )
    assert other.best_loss != whole.best_loss

    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.what == "train" and event.done == 4:
            raise KeyboardInterrupt

    where = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        run("pnr", stop, learning_rate=1e-3, kind_options=own, out_dir=where)
    again, _ = run("pnr", learning_rate=1e-3, kind_options=own, out_dir=where, resume=True)
    assert again.best_loss == pytest.approx(whole.best_loss, abs=1e-9)


@pytest.mark.parametrize("compression", ["prune", "decay"])
def test_every_regularization_is_stored(compression, run):
    own = {"compression": compression, "period": 2, "sparsity": 0.9}
    done, _ = run("pnr", steps=4, learning_rate=1e-3, kind_options=own)
    layers = CheckpointReader(done.out_dir).manifest.layers.values()
    assert {entry.format for entry in layers} == {
        "sparse_planes" if compression == "prune" else "binary_coding"
    }
    for code in filter(None, (entry.scheme.code for entry in layers)):
        assert code.num_inputs / code.num_outputs < 0.1, "more is stored than there is to say"
    assert torch.isfinite(load_model(Location(done.out_dir), device="cpu").model(IDS).logits).all()


def test_what_diverges_keeps_the_last_good_state(run):
    """No weight that is written is worse than what it began with."""
    done, events = run("distillation", learning_rate=1e30)
    said = [event.message for event in events if isinstance(event, Notice)]
    assert any("diverged" in one and "last good state" in one for one in said)
    assert done.best_loss <= done.first_loss
    logits = load_model(Location(done.out_dir), device="cpu").model(IDS).logits
    assert torch.isfinite(logits).all()


def test_what_is_impossible_is_said_at_once(run, base, tmp_path):
    with pytest.raises(RecipeError, match="code_rate"):
        run("distillation", kind_options={"code_rate": -1})
    with pytest.raises(RecipeError, match="Did you mean 'hidden'"):
        run("distillation", kind_options={"hiden": 1})
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "w3 w4 w5"}) + "\n")
    with pytest.raises(DataError, match="at least 2"):
        run("distillation", data=short)
    with pytest.raises(ModelError, match="no dense encoder"):
        run("finetune", model=base)


def test_another_model_than_what_was_quantized_is_no_original(run, tiny, tmp_path):
    """Not one of another family whose shapes are the same, nor a deeper one."""
    deeper = tmp_path / "deeper"
    families.build("llama", num_hidden_layers=3).save_pretrained(deeper)
    families.save_tokenizer(deeper)
    for other, key in ((tiny("qwen3"), "model_type"), (deeper, "num_hidden_layers")):
        with pytest.raises(ModelError, match=rf"wasn't made of .*{key}.*--original"):
            run("distillation", original=other)
    assert not (tmp_path / "out").exists()


def test_a_result_never_lies_in_its_original(run, llama):
    before = file_hashes(llama)
    with pytest.raises(OutputError, match="is the model that is read, or lies in it"):
        run("distillation", out_dir=llama / "trained")
    assert file_hashes(llama) == before


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    from transformers import BertModel

    directory = tmp_path_factory.mktemp("bert") / "bert"
    torch.manual_seed(0)
    BertModel(families.configuration("bert", tied=False)).save_pretrained(directory)
    families.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Return texts whose class is whether they begin with `w3`."""
    path = tmp_path_factory.mktemp("classes") / "classes.jsonl"
    rows = [
        {"sentence": f"{'w3' if seed % 2 else 'w4'} {families.text(4, seed)}", "label": seed % 2}
        for seed in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def classifier(encoder, classes, tmp_path_factory) -> tuple[Path, Path]:
    """Return a dense classifier, and the same in two bits."""
    folder = tmp_path_factory.mktemp("classifier")
    options = TrainOptions(steps=40, learning_rate=3e-3, checks=4)
    request = TrainRequest(
        model=Location(encoder),
        data=classes,
        out_dir=folder / "dense",
        recipe="finetune",
        validation=classes,
        options=options,
    )
    done = train(request)
    assert done.scores["after"]["accuracy"] > 0.95
    pipeline.quantize(Location(folder / "dense"), folder / "w2", recipe_from_mapping(WEIGHTS))
    return folder / "dense", folder / "w2"


def test_a_classifier_is_made_quantized_and_trained(classifier, classes, tmp_path):
    dense, quantized = classifier
    request = TrainRequest(
        model=Location(quantized),
        original=Location(dense),
        data=classes,
        validation=classes,
        out_dir=tmp_path / "trained",
        recipe="teacher-intervention",
        options=TrainOptions(steps=12, learning_rate=0.01, checks=3),
    )
    done = train(request)
    assert done.best_loss < done.first_loss
    assert done.scores["after"]["accuracy"] >= done.scores["before"]["accuracy"] - 0.05
    model = load_model(Location(tmp_path / "trained"), device="cpu").model
    assert type(model).__name__ == "BertForSequenceClassification"


def test_a_dense_classifier_is_quantized_without_data_and_trained(classifier, classes, tmp_path):
    dense, _ = classifier
    weights = {**WEIGHTS["weights"], "method": "rtn", "options": {}}
    values = {"calibration": {}, "weights": weights, "training": {"name": "distillation"}}
    events: list[Any] = []
    request = TrainRequest(
        model=Location(dense),
        data=classes,
        validation=classes,
        out_dir=tmp_path / "out",
        recipe="",
        options=TrainOptions(steps=6, learning_rate=0.01, checks=1),
    )
    done = quantize_and_train(recipe_from_mapping(values), request, emit=events.append)
    assert done.best_loss < done.first_loss
    assert done.scores["original"]["accuracy"] > 0.95
    said = [event.message for event in events if isinstance(event, Notice)]
    assert any("without data" in one for one in said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence": "w3", "label": 2}, r"line 1 .*label 2; a whole number from 0 to 1"),
        ({"sentence": "w3", "label": "yes"}, "label 'yes'"),
        ({"sentence": "w3", "label": True}, "label True"),
        ({"label": 1}, "has no text"),
        ({"sentence1": "w3", "sentence2": "", "label": 1}, "has no text"),
    ],
)
def test_labels_that_are_none_are_refused(row, said, classifier, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    dense, quantized = classifier
    request = TrainRequest(
        model=Location(quantized),
        original=Location(dense),
        data=data,
        out_dir=tmp_path / "out",
        recipe="distillation",
    )
    with pytest.raises(DataError, match=said):
        train(request)
    assert not (tmp_path / "out").exists()


def test_labels_that_tell_nothing_apart_or_leave_a_gap_are_refused(encoder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"sentence": "w3", "label": 1}\n' * 3)
    request = TrainRequest(
        model=Location(encoder), data=data, out_dir=tmp_path / "out", recipe="finetune"
    )
    with pytest.raises(DataError, match=r"All 3 lines .* have the label 1"):
        train(request)
    data.write_text('{"sentence": "w3", "label": 0}\n{"sentence": "w4", "label": 2}\n')
    with pytest.raises(DataError, match=r"labels up to 2, and no line with 1\. Number"):
        train(request)


def test_a_full_disk_is_told_and_what_was_begun_is_gone(encoder, classes, tmp_path, monkeypatch):
    def full(_model: Any, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").touch()
        raise SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    request = TrainRequest(
        model=Location(encoder),
        data=classes,
        out_dir=tmp_path / "out",
        recipe="finetune",
        options=TrainOptions(steps=1, checks=1),
    )
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(OutputError, match=r"disk of .*out is full"):
            train(request)
    assert list(tmp_path.iterdir()) == []
    assert train(request).out_dir.exists()


def test_a_dense_result_costs_nobody_a_folder_and_its_place_is_known_first(
    encoder, classes, tmp_path, monkeypatch
):
    def request(name: str) -> TrainRequest:
        return TrainRequest(
            model=Location(encoder),
            data=classes,
            out_dir=Path(name),
            recipe="finetune",
            options=TrainOptions(steps=1, checks=1),
        )

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial/thesis.txt").write_text("mine")
    learned = "qtool.pipeline.train_dense.train_stages"
    with monkeypatch.context() as patch:
        patch.setattr(learned, None)
        for name in (".", "x/..", "../here", "../mine"):
            with pytest.raises(OutputError):
                train(request(name))

    def meanwhile(*values: Any) -> Any:
        (tmp_path / "here/out.partial").mkdir(exist_ok=True)
        (tmp_path / "here/out.partial/notes.txt").write_text("mine")
        with pytest.raises(OutputError, match="Another run is writing"):
            train(request("out"))
        return train_stages(*values)

    monkeypatch.setattr(learned, meanwhile)
    train(request("out"))
    texts = {path.name for path in tmp_path.rglob("*.txt") if path.parent.suffix == ".partial"}
    assert texts == {"thesis.txt", "notes.txt"}
    assert (tmp_path / "here/out/config.json").exists()
