import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.data.corpora import Corpus, tokenize
from qtool.errors import DataError
from qtool.evaluation.perplexity import perplexity, window_loss
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from tests.families import VOCABULARY, text


@pytest.fixture(scope="module")
def loaded(llama):
    return load_model(Location(llama), device="cpu")


@pytest.fixture(scope="module")
def corpus():
    return Corpus("words", text(203, seed=5))


def plain_perplexity(model, tokens: list[int], length: int) -> float:
    """Compute it token by token, with the textbook's softmax, in float64."""
    losses = []
    for start in range(0, len(tokens) - length + 1, length):
        window = torch.tensor(tokens[start : start + length])
        with torch.inference_mode():
            logits = model(window.unsqueeze(0), use_cache=False).logits[0].double()
        for position in range(length - 1):
            probability = torch.softmax(logits[position], -1)[window[position + 1]]
            losses.append(-math.log(float(probability)))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("length", [2, 7, 50, 100, 203])
def test_equals_the_textbook(loaded, corpus, length):
    tokens = tokenize(loaded.tokenizer, corpus.text).tolist()
    result = perplexity(loaded, corpus, context_length=length)
    assert result.perplexity == pytest.approx(plain_perplexity(loaded.model, tokens, length), 1e-5)
    assert result.windows == result.windows_in_dataset == 203 // length


def test_window_longer_than_a_piece_of_the_loss_is_summed_whole(loaded):
    window = torch.randint(3, VOCABULARY, (500,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = loaded.model(window.unsqueeze(0)).logits[0, :-1]
    whole = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
    assert window_loss(loaded, window) == pytest.approx(float(whole), rel=1e-5)


def test_first_windows_are_those_of_the_whole(loaded, corpus):
    tokens = tokenize(loaded.tokenizer, corpus.text).tolist()
    result = perplexity(loaded, corpus, context_length=50, max_windows=2)
    assert (result.windows, result.windows_in_dataset) == (2, 4)
    expected = plain_perplexity(loaded.model, tokens[:100], 50)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)


def test_more_windows_than_there_are_means_all(loaded, corpus):
    assert perplexity(loaded, corpus, context_length=50, max_windows=99).windows == 4


def test_result_says_what_it_depends_on(loaded, corpus):
    result = perplexity(loaded, corpus, context_length=64)
    assert (result.dataset, result.context_length) == ("words", 64)
    assert (result.dtype, result.device) == ("float32", "cpu")


def test_events_carry_the_running_perplexity(loaded, corpus):
    events: list[Any] = []
    result = perplexity(loaded, corpus, context_length=50, emit=events.append)
    assert [event.done for event in events] == [0, 1, 2, 3, 4]
    assert events[-1].detail == f"{result.perplexity:.3f}"


def test_random_model_is_about_as_good_as_guessing(loaded, corpus):
    result = perplexity(loaded, corpus, context_length=100)
    assert VOCABULARY / 2 < result.perplexity < VOCABULARY * 2


def test_uniform_model_has_the_size_of_the_vocabulary(corpus, loaded):
    def uniform(tokens, **_kwargs):
        return SimpleNamespace(logits=torch.zeros(*tokens.shape, VOCABULARY))

    sizes = SimpleNamespace(vocab_size=VOCABULARY)
    uniform.config = SimpleNamespace(get_text_config=lambda: sizes)  # type: ignore[attr-defined]
    cpu = torch.device("cpu")
    model = LoadedModel("uniform", loaded.directory, uniform, loaded.tokenizer, cpu, torch.float32)
    assert perplexity(model, corpus, context_length=50).perplexity == pytest.approx(VOCABULARY)


def test_context_longer_than_the_positions_is_refused_with_the_limit(loaded, corpus):
    with pytest.raises(DataError, match=r"has 512 positions\. Use --context-length 512 or less"):
        perplexity(loaded, corpus, context_length=513)


def test_text_shorter_than_a_window_is_refused_with_both_lengths(loaded, corpus):
    with pytest.raises(DataError, match="words has 203 tokens, fewer than one window of 204"):
        perplexity(loaded, corpus, context_length=204)


@pytest.mark.parametrize(
    "choice", [{"context_length": 1}, {"context_length": 0}, {"max_windows": 0}]
)
def test_window_that_predicts_nothing_is_refused(loaded, corpus, choice):
    with pytest.raises(DataError, match="at least"):
        perplexity(loaded, corpus, **{"context_length": 50, **choice})


def test_empty_text_is_refused(loaded):
    with pytest.raises(DataError, match="empty has 0 tokens"):
        perplexity(loaded, Corpus("empty", ""), context_length=10)


def test_stream_is_the_whole_text_without_truncation(loaded):
    stream = tokenize(loaded.tokenizer, text(5000))
    assert len(stream) == 5000
