import dataclasses
import json
import logging
import math
import statistics
from typing import Any

import pytest
import torch

from qtool.base import Progress
from qtool.core.divergence import kl_divergences
from qtool.data.corpora import Corpus
from qtool.errors import DataError, ModelError
from qtool.evaluation import predictions
from qtool.evaluation.agreement import (
    Agreement,
    compare_to_reference,
    record_reference,
)
from qtool.evaluation.predictions import token_values
from qtool.modeling.load import LoadedModel, load_model
from qtool.modeling.locate import Location
from tests import families
from tests.families import VOCABULARY, text

WINDOWS, LENGTH = 4, 50
PREDICTED = WINDOWS * (LENGTH - 1)


@pytest.fixture(scope="module")
def loaded(llama):
    return load_model(Location(llama), device="cpu")


@pytest.fixture(scope="module")
def perturbed(llama):
    model = load_model(Location(llama), device="cpu")
    generator = torch.Generator().manual_seed(3)
    for weight in model.model.parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def corpus():
    return Corpus("words", text(WINDOWS * LENGTH + 3, seed=5))


@pytest.fixture(scope="module")
def reference(loaded, corpus):
    return record_reference(loaded, corpus, context_length=LENGTH, new_tokens=8)


@pytest.fixture(scope="module")
def measured(perturbed, reference):
    return compare_to_reference(perturbed, reference)


def plain_log_probabilities(model, windows) -> torch.Tensor:
    """Return them for all positions, (positions, vocabulary) float64."""
    with torch.inference_mode():
        logits = [model.model(window.unsqueeze(0)).logits[0, :-1] for window in windows]
    return torch.cat(logits).double().log_softmax(1)


def plain_divergences(original, quantized, windows) -> list[float]:
    """Compute them position by position, by the textbook's sum."""
    both = (plain_log_probabilities(model, windows) for model in (original, quantized))
    return [
        float((log_p.exp() * (log_p - log_q)).sum()) for log_p, log_q in zip(*both, strict=True)
    ]


def test_model_agrees_with_itself(loaded, reference):
    found = compare_to_reference(loaded, reference)
    assert abs(found.kl_divergence) < 1e-6
    assert found.kl_p99 < 1e-6
    assert (found.top1_agreement, found.top1_standard_error) == (1, 0)
    assert found.greedy_equal_share == 1
    assert len(found.greedy) == 4
    for diff in found.greedy:
        assert diff.original == diff.quantized
        assert diff.equal_tokens == diff.tokens <= 8


def test_divergence_is_the_textbooks(loaded, perturbed, reference, measured):
    expected = plain_divergences(loaded, perturbed, reference.windows)
    assert measured.positions == len(expected) == PREDICTED
    assert measured.kl_divergence > 1e-3
    assert measured.kl_divergence == pytest.approx(statistics.fmean(expected), rel=1e-4)
    error = statistics.stdev(expected) / math.sqrt(PREDICTED)
    assert measured.kl_standard_error == pytest.approx(error, rel=1e-4)
    p99 = statistics.quantiles(expected, n=100, method="inclusive")[-1]
    assert measured.kl_p99 == pytest.approx(p99, rel=1e-4)


def test_quantized_checkpoint_is_compared_like_any_model(checkpoint, loaded, reference):
    quantized = load_model(Location(checkpoint), device="cpu")
    found = compare_to_reference(quantized, reference)
    expected = statistics.fmean(plain_divergences(loaded, quantized, reference.windows))
    assert found.kl_divergence == pytest.approx(expected, rel=1e-3)
    assert found.kl_divergence > 3 * found.kl_standard_error


def test_top1_counts_equal_choices(loaded, perturbed, reference, measured):
    models = (loaded, perturbed)
    first, second = (plain_log_probabilities(m, reference.windows).argmax(1) for m in models)
    share = float((first == second).double().mean())
    assert 0.2 < share < 1
    assert measured.top1_agreement == pytest.approx(share)
    error = math.sqrt(share * (1 - share) / (PREDICTED - 1))
    assert measured.top1_standard_error == pytest.approx(error)


@pytest.mark.parametrize("positions", [2, 3, 7, 49, 100, 195])
def test_positions_are_a_spread_subset_of_all(loaded, perturbed, corpus, positions):
    chosen = record_reference(loaded, corpus, context_length=LENGTH, positions=positions, prompts=0)
    steps = chosen.positions.diff()
    assert len(chosen.positions) == positions
    assert int(steps.max() - steps.min()) <= 1
    assert 0 <= int(chosen.positions.min()) <= int(chosen.positions.max()) < PREDICTED
    every = plain_divergences(loaded, perturbed, chosen.windows)
    expected = statistics.fmean(every[place] for place in chosen.positions.tolist())
    assert compare_to_reference(perturbed, chosen).kl_divergence == pytest.approx(expected, 1e-4)


def test_windows_without_a_position_are_not_run(loaded, corpus):
    events: list[Any] = []
    record_reference(
        *(loaded, corpus),
        context_length=10,
        positions=3,
        prompts=0,
        emit=events.append,
    )
    what = f"predictions of {loaded.name} on words"
    assert events == [Progress(what, done, 3) for done in (0, 1, 2, 3)]


def test_more_positions_than_there_are_means_all(loaded, corpus):
    found = record_reference(loaded, corpus, context_length=LENGTH, max_windows=2, prompts=0)
    assert found.positions.tolist() == list(range(2 * (LENGTH - 1)))
    assert found.windows.shape == (2, LENGTH)
    assert found.log_probabilities.shape == (2 * (LENGTH - 1), VOCABULARY)
    assert found.log_probabilities.dtype == torch.float32


def test_pieces_change_nothing(loaded, perturbed, corpus, measured, monkeypatch):
    monkeypatch.setattr(predictions, "CHUNK_VALUES", 7 * VOCABULARY + 1)
    again = record_reference(loaded, corpus, context_length=LENGTH, new_tokens=8)
    assert compare_to_reference(perturbed, again) == measured


def test_result_is_plain_data_that_says_what_it_depends_on(measured):
    assert (measured.dataset, measured.context_length) == ("words", LENGTH)
    values = json.loads(json.dumps(dataclasses.asdict(measured)))
    assert set(values) == {field.name for field in dataclasses.fields(Agreement)}
    assert values["greedy"][0]["prompt"].startswith("w")


def test_greedy_text_is_counted_up_to_the_first_difference(perturbed, reference, measured):
    assert measured.greedy_equal_share is not None
    assert measured.greedy_equal_share < 1
    shares = []
    for diff, prompt in zip(measured.greedy, reference.prompts, strict=True):
        original, quantized = diff.original.split(), diff.quantized.split()
        assert diff.prompt == perturbed.tokenizer.decode(list(prompt))
        assert original[: diff.equal_tokens] == quantized[: diff.equal_tokens]
        if diff.equal_tokens < diff.tokens:
            rest = original[diff.equal_tokens :], quantized[diff.equal_tokens :]
            assert rest[0][:1] != rest[1][:1]
        shares.append(diff.equal_tokens / diff.tokens)
    assert measured.greedy_equal_share == pytest.approx(statistics.fmean(shares))


def test_stopping_early_is_a_difference(loaded, reference):
    longer = dataclasses.replace(
        reference, continuations=tuple((*tokens, 5) for tokens in reference.continuations)
    )
    for diff in compare_to_reference(loaded, longer).greedy:
        assert diff.tokens == diff.equal_tokens + 1


def test_prompts_are_evenly_spaced_beginnings(reference):
    stream = reference.windows.flatten().tolist()
    assert reference.prompts == tuple(tuple(stream[at : at + 32]) for at in (0, 50, 100, 150))


def test_no_prompts_no_greedy_text(loaded, corpus):
    none = record_reference(loaded, corpus, context_length=LENGTH, prompts=0)
    found = compare_to_reference(loaded, none)
    assert (found.greedy, found.greedy_equal_share) == ((), None)


def test_sampling_options_of_the_model_raise_no_warning(llama, corpus, caplog, monkeypatch):
    model = load_model(Location(llama), device="cpu")
    model.model.generation_config.temperature = 0.3
    model.model.generation_config.top_k = 5
    log = logging.getLogger("transformers")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        record_reference(model, corpus, context_length=LENGTH, positions=2, new_tokens=2)
        assert not caplog.records
        assert log.level == logging.WARNING


def test_comparing_tells_how_far_it_is(perturbed, reference):
    events: list[Any] = []
    compare_to_reference(perturbed, reference, events.append)
    what = f"predictions of {perturbed.name} on words"
    predicted = [Progress(what, done, WINDOWS) for done in range(WINDOWS + 1)]
    assert events[: WINDOWS + 1] == predicted
    what, prompts = f"continuations by {perturbed.name}", len(reference.prompts)
    assert events[WINDOWS + 1 :] == [Progress(what, done, prompts) for done in range(prompts)]
    assert prompts


def test_another_vocabulary_is_refused_with_both_sizes(loaded, reference):
    other = dataclasses.replace(
        loaded, name="other", model=families.build("llama", vocab_size=VOCABULARY + 8).float()
    )
    with pytest.raises(DataError, match=r"other has a vocabulary of 104 tokens and .* one of 96"):
        compare_to_reference(other, reference)


@pytest.mark.parametrize("positions", [-1, 0, 1])
def test_too_few_positions_are_refused(loaded, corpus, positions):
    with pytest.raises(DataError, match=r"of 196 predicted positions .* needs at least 2"):
        record_reference(loaded, corpus, context_length=LENGTH, positions=positions)


def test_text_of_one_position_is_refused(loaded, corpus):
    with pytest.raises(DataError, match="1 of 1 predicted positions of words"):
        record_reference(loaded, corpus, context_length=2, max_windows=1)


def test_window_longer_than_the_text_is_refused(loaded, corpus):
    with pytest.raises(DataError, match="fewer than one window"):
        record_reference(loaded, corpus, context_length=300)


@pytest.mark.parametrize("new_tokens", [0, 481])
def test_continuation_beyond_the_positions_is_refused(loaded, corpus, new_tokens):
    with pytest.raises(DataError, match=f"32 tokens is to be continued by {new_tokens}.* has 512"):
        record_reference(loaded, corpus, context_length=LENGTH, new_tokens=new_tokens)


def test_output_that_is_no_number_is_refused(llama, reference):
    model = load_model(Location(llama), device="cpu")
    model.model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(ModelError, match="not numbers, in window 0"):
        compare_to_reference(model, reference)


def test_tokens_that_both_models_exclude_count_nothing():
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.5, 0.25]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergences(log_p, log_q).tolist() == pytest.approx([expected, 0])


def test_rounding_gives_no_negative_divergence():
    logits = 5 * torch.randn(50, 5000, generator=torch.Generator().manual_seed(0))
    noise = 1e-5 * torch.randn(50, 5000, generator=torch.Generator().manual_seed(1))
    found = kl_divergences(logits.log_softmax(1), (logits + noise).log_softmax(1))
    assert 0 <= float(found.min()) <= float(found.max()) < 1e-8


def test_tokenizer_without_padding_is_enough(loaded, corpus, reference):
    class NoPadding:
        pad_token_id = None

        def __call__(self, *args, **kwargs):
            return loaded.tokenizer(*args, **kwargs)

    model: LoadedModel = dataclasses.replace(loaded, tokenizer=NoPadding())
    found = record_reference(model, corpus, context_length=LENGTH, new_tokens=8)
    assert found.continuations == reference.continuations


@pytest.mark.parametrize("positions", [3, 100, PREDICTED])
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_batches_change_nothing_but_noise(loaded, perturbed, corpus, positions, batch):
    """Four windows don't fill the last batch; a lone one is read beside itself."""
    found = record_reference(loaded, corpus, context_length=LENGTH, positions=positions, prompts=0)
    alone, together = (token_values(perturbed, found, batch=size) for size in (1, batch))
    assert len(alone.divergence) == positions
    for one, other in ((alone.divergence, together.divergence), (alone.gain, together.gain)):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    rows = []
    loaded.model.register_forward_pre_hook(
        lambda _, args, __: rows.append(len(args[0])), with_kwargs=True
    )
    try:
        token_values(loaded, found, batch=batch)
    finally:
        loaded.model._forward_pre_hooks.clear()
    assert set(rows) == {batch}


def test_gain_is_the_change_in_the_probability_of_the_next_token(loaded, perturbed, corpus):
    found = record_reference(loaded, corpus, context_length=LENGTH, positions=50, prompts=0)
    values = token_values(perturbed, found)
    both = (plain_log_probabilities(m, found.windows)[found.positions] for m in (loaded, perturbed))
    following = torch.cat([window[1:] for window in found.windows])[found.positions]
    before, after = (log_p.gather(1, following.unsqueeze(1)).exp().squeeze(1) for log_p in both)
    assert torch.allclose(values.gain, after - before, atol=1e-6)
    assert float(values.gain.abs().max()) > 1e-4


HABITS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 5.0},
    {"num_beams": 3, "return_dict_in_generate": True},
    {"cache_implementation": "quantized", "stop_strings": ["w5"]},
    {"penalty_alpha": 0.6, "top_k": 4, "bad_words_ids": [[5]]},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 4, "output_scores": True},
)


@pytest.mark.parametrize("habit", HABITS, ids=str)
def test_a_continuation_is_greedy_whatever_a_model_is_told_to_do(llama, corpus, reference, habit):
    model = load_model(Location(llama), device="cpu")
    told = model.model.generation_config
    told.update(**habit)
    again = record_reference(model, corpus, context_length=LENGTH, new_tokens=8)
    assert again.continuations == reference.continuations
    assert model.model.generation_config is told
