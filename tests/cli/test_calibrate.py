"""`qtool calibrate` and what `qtool quantize --calibration` makes of its directory."""

import json

import pytest

from qtool import pipeline
from qtool.data.calibration import load_calibration
from qtool.errors import DataError, RecipeError
from qtool.modeling.load import load_tokenizer
from qtool.recipe.load import recipe_from_mapping

CALIBRATION = {"num_samples": 6, "sequence_length": 32}


def recipe(method="gptq", **calibration):
    return recipe_from_mapping(
        {
            "calibration": {**CALIBRATION, **calibration},
            "weights": {"method": method, "scheme": {"num_bits": 3, "group_size": 16}},
        }
    )


def test_directory_gives_the_same_bytes_as_drawing_inline(llama, tmp_path):
    wanted = recipe()
    pipeline.calibrate(str(llama), tmp_path / "cal", wanted.calibration)
    pipeline.quantize(str(llama), tmp_path / "inline", wanted)
    pipeline.quantize(str(llama), tmp_path / "given", wanted, calib_dir=tmp_path / "cal")
    for name in ("model.safetensors", "config.json"):
        inline, given = (tmp_path / d / name for d in ("inline", "given"))
        assert inline.read_bytes() == given.read_bytes()


@pytest.mark.parametrize("method", ["gptq", "bcq"])
def test_same_seed_gives_the_same_bytes(llama, tmp_path, method):
    for name in ("one", "two"):
        pipeline.quantize(str(llama), tmp_path / name, recipe(method))
    one, two = (tmp_path / d / "model.safetensors" for d in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_matched_lengths_are_those_of_the_file(llama, tmp_path):
    section = recipe(sequence_length="match", num_tokens=400).calibration
    result = pipeline.calibrate(str(llama), tmp_path / "cal", section, lengths=(10, 10, 30, 30))
    assert set(result.lengths) == {10, 30}
    assert result.tokens == pytest.approx(400, rel=0.1)


def test_input_maxima_are_stored_for_every_linear(llama, tmp_path):
    from safetensors.torch import load_file

    pipeline.calibrate(str(llama), tmp_path / "cal", recipe().calibration)
    maxima = load_file(tmp_path / "cal" / "input_absmax.safetensors")
    assert set(maxima) == {layer.name for layer in pipeline.plan(str(llama), recipe()).layers}
    assert all(bool((values > 0).any()) for values in maxima.values())


def test_match_without_tasks_says_what_is_missing(llama, tmp_path):
    section = recipe(sequence_length="match").calibration
    with pytest.raises(RecipeError, match=r"calibration\.tasks is empty"):
        pipeline.calibrate(str(llama), tmp_path / "cal", section)
    assert not (tmp_path / "cal").exists()


def test_damaged_directory_is_refused(llama, tmp_path):
    directory = tmp_path / "cal"
    pipeline.calibrate(str(llama), directory, recipe().calibration)
    tokenizer = load_tokenizer(str(llama))
    assert len(load_calibration(directory, tokenizer).samples) == 6
    about = json.loads((directory / "calibration.json").read_text())
    for key, message in (("digest", "don't belong together"), ("tokenizer", "another tokenizer")):
        (directory / "calibration.json").write_text(json.dumps({**about, key: "other"}))
        with pytest.raises(DataError, match=message):
            load_calibration(directory, tokenizer)
    (directory / "samples.safetensors").unlink()
    with pytest.raises(DataError, match="no calibration directory"):
        load_calibration(directory, tokenizer)
