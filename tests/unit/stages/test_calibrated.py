"""Quantizing with calibration data: the walk through the blocks, from outside."""

import pytest
import torch

from qtool import pipeline
from qtool.checkpoint.reader import CheckpointReader
from qtool.errors import QtoolError
from qtool.modeling.load import load_model
from qtool.recipe.load import recipe_from_mapping
from tests.helpers import file_hashes

SCHEME = {"num_bits": 3, "group_size": 32}
QUICK: dict[str, dict[str, object]] = {"gptq": {}, "bcq": {"rounds": 5, "iterations": 2}}
METHODS = [*QUICK]


def recipe(method, dataset, **calibration):
    section = {"dataset": str(dataset), "num_samples": 6, "sequence_length": 64, **calibration}
    weights = {"method": method, "scheme": SCHEME, "options": QUICK[method]}
    return recipe_from_mapping({"calibration": section, "weights": weights})


@torch.inference_mode()
def output_error(original, directory) -> float:
    """Return the relative error of the logits on tokens that no sample holds."""
    tokens = torch.arange(3, 67).unsqueeze(0)
    expected, got = (load_model(str(where)).model(tokens).logits for where in (original, directory))
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_same_samples_give_the_same_bytes_and_are_recorded(llama, text_file, tmp_path, method):
    for name in ("a", "b"):
        pipeline.quantize(str(llama), tmp_path / name, recipe(method, text_file))
    first, second = file_hashes(tmp_path / "a"), file_hashes(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert first[name] == second[name]
    assert CheckpointReader(tmp_path / "a").manifest.calibration


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_resumes_to_the_same_bytes(llama, text_file, tmp_path, method):
    chosen = recipe(method, text_file)
    pipeline.quantize(str(llama), tmp_path / "whole", chosen)
    done = 0

    def stop(event, _values):
        nonlocal done
        done += event == "layer"
        if done == 9:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(str(llama), tmp_path / "out", chosen, emit=stop)
    pipeline.quantize(str(llama), tmp_path / "out", chosen, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert file_hashes(tmp_path / "out")[name] == file_hashes(tmp_path / "whole")[name]


def test_data_lowers_the_error_of_the_outputs(llama, text_file, tmp_path):
    weights = {"method": "rtn", "scheme": SCHEME}
    pipeline.quantize(str(llama), tmp_path / "rtn", recipe_from_mapping({"weights": weights}))
    plain = output_error(llama, tmp_path / "rtn")
    for method in METHODS:
        pipeline.quantize(str(llama), tmp_path / method, recipe(method, text_file))
        assert output_error(llama, tmp_path / method) < plain


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"dataset": "no-such-text"}, "Known: wikitext2-test"),
        ({"dataset": "missing.txt"}, "No text file"),
        ({"sequence_length": 10_000}, "10000"),
    ],
)
def test_unusable_samples_are_one_sentence_and_leave_nothing(
    llama, text_file, tmp_path, calibration, message
):
    chosen = {"dataset": text_file, **calibration}
    with pytest.raises(QtoolError, match=message) as caught:
        pipeline.quantize(str(llama), tmp_path / "out", recipe("gptq", **chosen))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_method_that_needs_data_says_so_without_it(llama, tmp_path):
    with pytest.raises(QtoolError, match="gptq"):
        pipeline.quantize(
            str(llama), tmp_path / "out", recipe_from_mapping({"weights": {"method": "gptq"}})
        )
    assert list(tmp_path.iterdir()) == []
