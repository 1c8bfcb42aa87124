"""`qtool calibrate` and what `qtool quantize --calibration` makes of its directory."""

import hashlib
import importlib
import json
import sys
from typing import Any

import pytest

from qtool import pipeline
from qtool.data.calibration_files import load_calibration
from qtool.errors import DataError, OutputError, RecipeError
from qtool.modeling.load import load_tokenizer
from qtool.modeling.locate import Location
from qtool.recipe.load import recipe_from_mapping
from tests.families import text
from tests.helpers import warnings_in

CALIBRATION = {"num_samples": 6, "sequence_length": 32}
SMALL = ("--set", "calibration.num_samples=4", "--set", "calibration.sequence_length=16")


def recipe(method="gptq", **calibration):
    return recipe_from_mapping(
        {
            "calibration": {**CALIBRATION, **calibration},
            "weights": {"method": method, "scheme": {"num_bits": 3, "group_size": 16}},
        }
    )


def test_directory_gives_the_same_bytes_as_drawing_inline(llama, tmp_path):
    wanted = recipe()
    pipeline.calibrate(Location(llama), tmp_path / "cal", wanted.calibration)
    pipeline.quantize(Location(llama), tmp_path / "inline", wanted)
    pipeline.quantize(Location(llama), tmp_path / "given", wanted, calib_dir=tmp_path / "cal")
    for name in ("model.safetensors", "config.json"):
        inline, given = (tmp_path / d / name for d in ("inline", "given"))
        assert inline.read_bytes() == given.read_bytes()


@pytest.mark.parametrize("method", ["gptq", "bcq"])
def test_same_seed_gives_the_same_bytes(llama, tmp_path, method):
    for name in ("one", "two"):
        pipeline.quantize(Location(llama), tmp_path / name, recipe(method))
    one, two = (tmp_path / d / "model.safetensors" for d in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_matched_lengths_are_those_of_the_file(llama, tmp_path):
    section = recipe(sequence_length="match", num_tokens=400).calibration
    result = pipeline.calibrate(
        Location(llama), tmp_path / "cal", section, lengths=(10, 10, 30, 30)
    )
    assert set(result.lengths) == {10, 30}
    assert result.tokens == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_do_not_replace_each_others_samples(llama, tmp_path, monkeypatch, overwrite):
    def calibrate(seed):
        place = tmp_path / "deep/cal"
        section = recipe().calibration
        pipeline.calibrate(Location(llama), place, section, seed=seed, overwrite=overwrite)

    def draw_beside_another(*arguments, **options):
        monkeypatch.setattr(calibrating, "draw_calibration", draw)
        with pytest.raises(OutputError, match="Another run is writing"):
            calibrate(1)
        return draw(*arguments, **options)

    calibrating = importlib.import_module("qtool.pipeline.calibrate")
    draw = calibrating.draw_calibration
    monkeypatch.setattr(calibrating, "draw_calibration", draw_beside_another)
    calibrate(0)
    assert load_calibration(tmp_path / "deep/cal", load_tokenizer(llama)).provenance["seed"] == 0
    if not overwrite:
        with pytest.raises(OutputError, match="holds calibration data"):
            calibrate(1)


def test_a_run_that_ends_in_an_error_leaves_no_folder(llama, tmp_path):
    (tmp_path / "one.txt").write_text("w3")
    (tmp_path / "mine").mkdir()
    section = recipe(dataset=str(tmp_path / "one.txt"), mixture=None).calibration
    for name in ("new", "mine"):
        with pytest.raises(DataError):
            pipeline.calibrate(Location(llama), tmp_path / name, section)
    assert {path.name for path in tmp_path.iterdir()} == {"one.txt", "mine"}


def test_folder_of_an_older_version_is_read(llama, tmp_path):
    pipeline.calibrate(Location(llama), tmp_path / "cal", recipe().calibration)
    (tmp_path / "cal" / "input_absmax.safetensors").write_bytes(b"what nobody reads any more")
    tokenizer = load_tokenizer(llama)
    assert len(load_calibration(tmp_path / "cal", tokenizer).samples) == 6
    again = recipe(num_samples=4).calibration
    pipeline.calibrate(Location(llama), tmp_path / "cal", again, overwrite=True)
    assert len(load_calibration(tmp_path / "cal", tokenizer).samples) == 4


def test_match_without_tasks_says_what_is_missing(llama, tmp_path):
    section = recipe(sequence_length="match").calibration
    with pytest.raises(RecipeError, match=r"calibration\.tasks is empty"):
        pipeline.calibrate(Location(llama), tmp_path / "cal", section)
    assert not (tmp_path / "cal").exists()


def test_damaged_directory_is_refused(llama, tmp_path):
    directory = tmp_path / "cal"
    pipeline.calibrate(Location(llama), directory, recipe().calibration)
    tokenizer = load_tokenizer(llama)
    assert len(load_calibration(directory, tokenizer).samples) == 6
    about = json.loads((directory / "calibration.json").read_text())
    for key, message in (("digest", "don't belong together"), ("tokenizer", "another tokenizer")):
        (directory / "calibration.json").write_text(json.dumps({**about, key: "other"}))
        with pytest.raises(DataError, match=message):
            load_calibration(directory, tokenizer)
    (directory / "samples.safetensors").unlink()
    with pytest.raises(DataError, match="no calibration directory"):
        load_calibration(directory, tokenizer)


def rows_file(tmp_path, count=12, words=20, name="rows.jsonl"):
    path = tmp_path / name
    rows = [json.dumps({"text": text(words, seed)}) for seed in range(count)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def about(calib_dir):
    return json.loads((calib_dir / "calibration.json").read_text())


def test_provenance_says_all_that_decided_the_samples(llama, tmp_path):
    rows = rows_file(tmp_path)
    section = recipe(dataset=str(rows), sequence_length="match", num_tokens=60).calibration
    pipeline.calibrate(Location(llama), tmp_path / "cal", section, lengths=(10, 10, 10, 30), seed=5)
    found = about(tmp_path / "cal")
    assert found["dataset"] == "rows.jsonl"
    assert found["sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    assert found["seed"] == 5
    assert found["sequence_length"] == "match"
    assert found["tasks"] == []
    assert found["chat template"] is False
    assert found["starts at documents"] is True
    assert found["samples"] == found["samples wanted"] == 4
    assert found["tokens"] == 60
    requested, used = found["requested lengths"], found["used lengths"]
    assert requested["edges"] == used["edges"]
    assert requested["shares"] == used["shares"] == [0.75, *[0] * (len(used["shares"]) - 2), 0.25]
    assert (used["p10"], used["median"], used["p90"]) == (10, 10, 30)


def test_matched_tasks_are_in_the_provenance(llama, tmp_path):
    section = recipe(sequence_length="match", tasks=["humaneval"], num_tokens=1000).calibration
    pipeline.calibrate(Location(llama), tmp_path / "cal", section)
    assert about(tmp_path / "cal")["tasks"] == ["humaneval"]


def test_documents_calibrate_and_quantize_the_same_inline(llama, tmp_path):
    wanted = recipe(dataset=str(rows_file(tmp_path)))
    result = pipeline.calibrate(Location(llama), tmp_path / "cal", wanted.calibration)
    pipeline.quantize(Location(llama), tmp_path / "inline", wanted)
    config = json.loads((tmp_path / "inline" / "config.json").read_text())
    assert config["quantization_config"]["calibration"] == result.digest


@pytest.mark.parametrize("run", ["calibrate", "quantize"])
def test_text_that_is_too_short_is_warned_of(llama, tmp_path, run):
    wanted = recipe(dataset=str(rows_file(tmp_path, count=4)))
    events: list[Any] = []
    if run == "calibrate":
        pipeline.calibrate(
            Location(llama), tmp_path / "out", wanted.calibration, emit=events.append
        )
    else:
        pipeline.quantize(Location(llama), tmp_path / "out", wanted, emit=events.append)
    assert (
        "rows.jsonl is too short: 2 of 6 samples were drawn, 64 tokens in place of 192. Use a "
        "longer text, or lower calibration.num_samples."
    ) in warnings_in(events)


def test_fixed_is_what_a_model_has_positions_for_and_2048_at_most(llama, tmp_path):
    section = recipe(sequence_length="fixed").calibration
    result = pipeline.calibrate(Location(llama), tmp_path / "cal", section)
    assert set(result.lengths) == {512}


def test_fixed_knows_the_positions_of_families_that_name_them_otherwise(tiny, tmp_path):
    section = recipe(sequence_length="fixed").calibration
    result = pipeline.calibrate(Location(tiny("gpt2")), tmp_path / "cal", section)
    assert set(result.lengths) == {512}


def test_number_above_the_positions_is_refused(llama, tmp_path):
    section = recipe(sequence_length=2048).calibration
    with pytest.raises(DataError, match=r"is 2048, but the model has 512 .* number of at most 512"):
        pipeline.calibrate(Location(llama), tmp_path / "cal", section)


def test_command_prints_lengths_and_warns_on_stderr(cli, llama, tmp_path):
    (tmp_path / "lengths.txt").write_text("10 10 30 30")
    options = ["--lengths", tmp_path / "lengths.txt", "--dataset", rows_file(tmp_path, count=3)]
    done = cli("calibrate", *options, llama, tmp_path / "cal")
    assert done.code == 0
    assert "requested" in done.out
    assert "Lengths requested: median 30, p10 10, p90 30." in done.out
    assert f"of {about(tmp_path / 'cal')['samples wanted']} samples" in done.out
    assert "rows.jsonl is too short" in " ".join(done.err.split())


def test_command_without_matplotlib_says_how_to_get_the_plot(cli, llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    options = ["--dataset", "wikitext2-valid", *SMALL, "--json", "-", llama, tmp_path / "cal"]
    cli("calibrate", *options)
    (tmp_path / "cal" / "lengths.png").write_bytes(b"of an earlier run")
    done = cli("calibrate", "--overwrite", *options)
    assert json.loads(done.out)["samples_wanted"] == 4
    (line,) = done.said
    assert line.startswith("No plot: lengths.png needs the 'report' extra. Run: pip install ")
    assert not (tmp_path / "cal" / "lengths.png").exists()


def test_command_draws_the_lengths_and_the_digest_leaves_them_out(cli, llama, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--dataset", "wikitext2-valid", *SMALL]
    assert cli("calibrate", *options, llama, tmp_path / "cal").said == []
    assert (tmp_path / "cal" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "cal" / "lengths.png").write_bytes(b"")
    load_calibration(tmp_path / "cal", load_tokenizer(llama))


def test_tasks_and_lengths_together_are_refused(cli, llama, tmp_path):
    (tmp_path / "lengths.txt").write_text("10")
    options = ["--lengths", tmp_path / "lengths.txt", "--tasks", "mmlu"]
    done = cli("calibrate", *options, llama, tmp_path / "cal")
    assert done.code == 1
    assert "Give one of them" in done.err
