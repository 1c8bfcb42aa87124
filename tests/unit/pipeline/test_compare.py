"""Models beside the first: one in memory at a time, and what another tool has quantized."""

import json
import math
import shutil
import statistics
import sys
import weakref
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool import pipeline
from qtool.errors import ModelError
from qtool.modeling import load as load_module
from qtool.modeling.locate import Location
from qtool.pipeline.evaluate import EvalOptions
from qtool.pipeline.model_texts import perplexity_change
from tests.helpers import recipe

comparing = sys.modules["qtool.pipeline.compare"]
FOREIGN = "a-tool-of-these-tests"


@register_quantization_config(FOREIGN)
class ForeignConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Of weights that are stored as they were: what matters is who may load them."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = FOREIGN


@register_quantizer(FOREIGN)
class ForeignQuantizer(HfQuantizer):  # type: ignore[misc]
    """Leaves everything as it is."""

    requires_calibration = False
    is_trainable = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True


@pytest.fixture
def options(text_file):
    texts = EvalOptions(dataset=str(text_file), context_length=40, max_windows=3, texts=False)
    return pipeline.CompareOptions(texts=texts)


@pytest.fixture(scope="module")
def foreign(llama, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(llama, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": FOREIGN}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_one_model_is_in_memory_at_a_time(llama, checkpoint, foreign, options, monkeypatch):
    alive: list[weakref.ref[Any]] = []
    load = load_module.load_model

    def checked(model, **settings):
        assert not [ref for ref in alive if ref() is not None]
        loaded = load(model, **settings)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(comparing, "load_model", checked)
    models = [Location(one) for one in (llama, checkpoint, foreign, llama)]
    pipeline.compare(models, options)
    assert len(alive) == len(models)


def test_model_of_another_tool_is_loaded_by_transformers(llama, checkpoint, foreign, options):
    models = [Location(one) for one in (llama, foreign, checkpoint)]
    result = pipeline.compare(models, options)
    first, other, own = result.models
    assert (first.foreign, other.foreign, own.foreign) == (None, FOREIGN, None)
    assert other.texts is not None
    assert other.texts.text is not None
    assert other.texts.text.divergence.maximum < 1e-6, "its weights are the original's"
    assert other.strict_bits == pytest.approx(first.strict_bits)
    assert own.strict_bits < other.strict_bits


def test_first_model_that_fails_ends_it(llama, options, tmp_path, foreign):
    broken = tmp_path / "broken"
    shutil.copytree(foreign, broken)
    text = (broken / "config.json").read_text().replace(FOREIGN, "unheard-of")
    (broken / "config.json").write_text(text)
    with pytest.raises(ModelError, match="unheard-of, which transformers doesn't know"):
        pipeline.compare([Location(broken), Location(llama)], options)


def test_missing_model_is_found_before_any_is_loaded(llama, tmp_path, options, monkeypatch):
    monkeypatch.setattr(comparing, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        pipeline.compare([Location(llama), Location(tmp_path)], options)


def test_perplexities_of_unlike_tokens_are_not_paired(llama, tmp_path, options):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["an-added-token"])
    tokenizer.save_pretrained(other)
    _, second = pipeline.compare([Location(llama), Location(other)], options).models
    assert second.texts is not None
    assert second.texts.change is None
    assert any("reads other tokens" in why for why in second.texts.why_not)
    assert second.texts.text is not None, "it reads the first's tokens there"


def test_strict_bits_are_those_of_inspect(checkpoint):
    from qtool.checkpoint.reader import CheckpointReader
    from qtool.checkpoint.sizes import sizes_of
    from qtool.pipeline.model_figures import strict_bits

    sizes = sizes_of(CheckpointReader(checkpoint))
    assert strict_bits(Location(checkpoint)) == pytest.approx(sizes.strict_bits)


def test_strict_bits_count_a_tied_head_once(tiny, tmp_path):
    from qtool.checkpoint.reader import CheckpointReader
    from qtool.checkpoint.sizes import sizes_of
    from qtool.pipeline.model_figures import strict_bits

    pipeline.quantize(Location(tiny("llama", tied=True)), tmp_path / "out", recipe())
    sizes = sizes_of(CheckpointReader(tmp_path / "out"))
    assert strict_bits(Location(tmp_path / "out")) == pytest.approx(sizes.strict_bits)


LOSSES = st.lists(st.tuples(st.floats(1, 500), st.floats(1, 500)), min_size=2, max_size=20)


@given(LOSSES)
def test_change_of_perplexity_is_the_textbooks(pairs):
    first, second = zip(*pairs, strict=True)
    change = perplexity_change(first, second, 100)
    assert change is not None
    nats = [(b - a) / 100 for a, b in pairs]
    assert change.log_ratio.value == pytest.approx(statistics.fmean(nats), abs=1e-9)
    error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert change.log_ratio.standard_error == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert change.ratio.value == pytest.approx(
        change.paired.quantized / change.paired.original, rel=1e-9
    )
    assert change.paired.difference == pytest.approx(
        math.exp(sum(second) / 100 / len(second)) - math.exp(sum(first) / 100 / len(first)),
        abs=1e-6,
    )


def test_few_windows_have_no_p_value():
    losses = [float(50 + number % 7) for number in range(30)]
    worse = [loss + 1 + 0.1 * (number % 3) for number, loss in enumerate(losses)]
    few, enough = (perplexity_change(losses[:n], worse[:n], 100) for n in (29, 30))
    assert few is not None
    assert enough is not None
    assert few.paired.p_value is None
    assert few.paired.standard_error is not None
    assert enough.paired.p_value is not None
    assert enough.paired.p_value < 1e-6


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e9])
def test_perplexity_that_is_none_has_no_change(loss):
    assert perplexity_change((1.0, 2.0), (loss, 1.0), 10) is None


def test_change_over_one_window_has_no_error():
    change = perplexity_change((10.0,), (12.0,), 10)
    assert change is not None
    assert change.log_ratio.standard_error is None
    assert change.paired.p_value is None


def test_model_beside_itself_is_the_same(llama, options):
    _, second = pipeline.compare([Location(llama), Location(llama)], options).models
    assert second.texts is not None
    assert second.texts.text is not None
    assert second.texts.text.divergence.maximum == pytest.approx(0, abs=1e-9)
    assert second.texts.text.same.value == 1
    assert second.texts.text.gain_rms.value == pytest.approx(0, abs=1e-9)
    assert second.texts.change is not None
    assert second.texts.change.paired.difference == 0


@pytest.mark.gpu
def test_noise_on_a_card_is_smaller_than_what_four_bits_lose(llama, checkpoint, options):
    result = pipeline.compare([Location(llama), Location(checkpoint)], options)
    assert result.noise is not None
    assert result.noise.text is not None
    _, own = result.models
    assert own.texts is not None
    assert own.texts.text is not None
    assert own.texts.perplexity.device == "cuda"
    assert result.noise.text.divergence.mean.value < own.texts.text.divergence.mean.value
